"""The flags of each command, parsed and checked without TensorFlow, TFDS or Beam."""
