"""What the student learns: replay of stored views and teacher logits, with no teacher in memory."""

import os

# TensorFlow 2.15 logs three errors at every import ("Unable to register cuDNN factory ...") that mean nothing.
# What goes wrong reaches Python as an exception all the same. Must be set before TensorFlow is imported.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
