"""The flags of each command, parsed without TensorFlow."""
