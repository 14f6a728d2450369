"""View indices to batches with targets: replay, online, arms."""
