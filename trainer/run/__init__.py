"""The outer loop of a training run."""
