"""Random layers of a student, such as dropout, as functions of the step.

Keras keeps the state of a layer's generator in a variable that no checkpoint contains, so that a continued run would draw
other numbers. The training step sets the state from its number instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from trainer.models.layers import leaf_layers


class Generators:
    """The generators of a student's random layers.

    Args:
      student: model whose layers were created in `trainer.models.layers.seeded_layers`.
    """

    def __init__(self, student: tf.keras.Model) -> None:
        holders = (getattr(layer, "_random_generator", None) for layer in leaf_layers(student))
        found = (getattr(holder, "_generator", None) for holder in holders)
        self._generators: Sequence[tf.random.Generator] = [g for g in found if g is not None]
        # Keras starts the counter at the layer's seed. Layers may have equal seeds.
        self._keys = [int(g.state.numpy()[0]) + (number << 32) for number, g in enumerate(self._generators)]

    def __len__(self) -> int:
        return len(self._generators)

    def reset(self, step: tf.Tensor) -> None:
        """Sets the state for a step, an int64 scalar. Replicas draw different numbers from equal states."""
        for generator, key in zip(self._generators, self._keys, strict=True):
            generator.reset(tf.stack([tf.zeros([], tf.int64), tf.cast(step, tf.int64), key]))
