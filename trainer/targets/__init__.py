"""View indices to batches with targets."""
