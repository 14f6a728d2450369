"""A student for runs in the tests' own process. A run of it costs a third of one of `tiny`, most of which is tracing and export."""

from __future__ import annotations

import tensorflow as tf

from trainer.config import choices
from trainer.models import STUDENTS
from trainer.models.small import GroupNormalization

MINIMAL = "minimal"


def minimal(num_classes: int, image_size: int) -> tf.keras.Model:
    """One convolution, with the normalization, head and value range of `tiny`."""
    layers = tf.keras.layers
    image = tf.keras.Input((image_size, image_size, 3), dtype=tf.float32, name="image")
    x = layers.Rescaling(1 / 127.5, offset=-1, dtype=tf.float32, name="scale")(image)
    x = layers.Conv2D(16, 3, strides=2, padding="same", use_bias=False, kernel_initializer="he_normal")(x)
    x = layers.ReLU()(GroupNormalization(8, dtype=tf.float32)(x))
    x = layers.GlobalAveragePooling2D(dtype=tf.float32)(x)
    logits = layers.Dense(num_classes, dtype=tf.float32, name="predictions")(x)
    return tf.keras.Model(image, logits, name=MINIMAL)


STUDENTS[MINIMAL] = minimal
choices.STUDENTS = tuple(STUDENTS)  # type: ignore[misc]
