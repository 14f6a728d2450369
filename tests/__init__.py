"""Tests, benchmarks and campaigns. All of them run with the Keras that commands use."""

from pipeline.cli.environment import use_keras_2

use_keras_2()  # before any of them imports TensorFlow
