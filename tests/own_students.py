"""Students as users write them, for `--student=tests.own_students:NAME`: good ones, and one per mistake."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

layers = tf.keras.layers


def batch_norm(num_classes: int, image_size: int) -> tf.keras.Model:
    """The smallest student with Keras's batch normalization, twice."""
    image = tf.keras.Input((image_size, image_size, 3), name="image")
    x = layers.Rescaling(1 / 127.5, offset=-1)(image)
    for _ in range(2):
        x = layers.Conv2D(8, 3, strides=2, use_bias=False)(x)
        x = layers.ReLU()(layers.BatchNormalization(momentum=0.5)(x))
    logits = layers.Dense(num_classes)(layers.GlobalAveragePooling2D()(x))
    return tf.keras.Model(image, logits, name="batch_norm")


def nested(num_classes: int, image_size: int) -> tf.keras.Model:
    """A Sequential model around a model with batch normalization and dropout."""
    scale = layers.Rescaling(1 / 127.5, offset=-1, dtype=tf.float32)
    head = layers.Dense(num_classes, dtype=tf.float32, name="head")
    return tf.keras.Sequential([scale, batch_norm(8, image_size), layers.Dropout(0.5), head])


class Subclass(tf.keras.Model):
    """A model whose `call` is written in Python."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.convolution, self.norm = layers.Conv2D(8, 3, strides=2), layers.BatchNormalization()
        self.head = layers.Dense(num_classes)

    def call(self, images: tf.Tensor) -> tf.Tensor:
        return self.head(tf.reduce_mean(self.norm(self.convolution(images / 255.0)), axis=[1, 2]))


def subclass(num_classes: int, image_size: int) -> tf.keras.Model:
    del image_size
    return Subclass(num_classes)


def _network(
    num_classes: int,
    image_size: int,
    *,
    more_classes: int = 0,
    more_pixels: int = 0,
    end: Callable[[tf.Tensor], Any] = tf.identity,
    trainable: bool = True,
    **kwargs: Any,
) -> tf.keras.Model:
    """A plain network with one property, which may be a mistake."""
    side = image_size + more_pixels
    image = tf.keras.Input((side, side, 3), **kwargs)
    pooled = layers.GlobalAveragePooling2D()(layers.Conv2D(4, 3)(tf.cast(image, tf.float32) / 255.0))
    model = tf.keras.Model(image, end(layers.Dense(num_classes + more_classes)(pooled)))
    model.trainable = trainable
    return model


class Untracked(layers.Layer):
    """Uses a variable that is no attribute of the layer, which no SavedModel can contain."""

    variables_elsewhere: tuple[tf.Variable, ...] = ()

    def call(self, x: tf.Tensor) -> tf.Tensor:
        return x * type(self).variables_elsewhere[0]


def untracked(num_classes: int, image_size: int) -> tf.keras.Model:
    Untracked.variables_elsewhere = (tf.Variable(2.0),)
    return _network(num_classes, image_size, end=Untracked())


def _in_python(x: tf.Tensor) -> tf.Tensor:
    return tf.ensure_shape(tf.numpy_function(np.sin, [x], tf.float32), x.shape)


def in_python(num_classes: int, image_size: int) -> tf.keras.Model:
    return _network(num_classes, image_size, end=layers.Lambda(_in_python))


def sigmoid(num_classes: int, image_size: int) -> tf.keras.Model:
    return _network(num_classes, image_size, end=layers.Activation("sigmoid"))


wide = functools.partial(_network, more_classes=1)
larger = functools.partial(_network, more_pixels=8)
softmax = functools.partial(_network, end=tf.nn.softmax)
two_outputs = functools.partial(_network, end=lambda x: [x, x])
whole_numbers = functools.partial(_network, dtype=tf.uint8)
fixed_batch = functools.partial(_network, batch_size=8)
frozen = functools.partial(_network, trainable=False)


def no_model(num_classes: int, image_size: int) -> Any:
    return num_classes * image_size


def failing(num_classes: int, image_size: int) -> Any:
    return {}[num_classes, image_size]


a_number = 3
