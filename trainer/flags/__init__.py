"""Flags of each command, parsed without TensorFlow."""
