"""Writing a store: options, lock, shard tasks, workers, publishing."""
