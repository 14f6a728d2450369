"""One training step: loss, Distiller, optimizers, schedules, and several steps as one XLA program."""
