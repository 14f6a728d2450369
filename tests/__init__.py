"""Tests, benchmarks and campaigns. All of them run with the Keras and the allocator that commands use."""

from pipeline.cli.allocator import keep_freed_memory
from pipeline.cli.environment import use_keras_2

use_keras_2()  # before any of them imports TensorFlow
keep_freed_memory()
