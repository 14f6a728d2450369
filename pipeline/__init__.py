"""What the teacher saw: seeded views of a data set and the teacher's logits for them, stored once."""

import os

# TensorFlow 2.15 logs three errors at every import ("Unable to register cuDNN factory ...") that mean
# nothing; what goes wrong reaches Python as an exception all the same. Read when TensorFlow is imported.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
