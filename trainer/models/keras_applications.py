"""Students `keras:NAME`: the classifiers of `tf.keras.applications`, on views in 0..255."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from pipeline.errors import UserError
from pipeline.errors.causes import first_line
from trainer.config.choices import KERAS_PREFIX
from trainer.models.layers import head_layer, rebuild

# Mean and standard deviation of ImageNet's pixels in 0..1, with which EfficientNetB0 to B7 are published. Keras sets them
# only together with the published weights, so that without them its layers just divide by 255.
_MEAN, _DEVIATION = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
# Always float32, since they take pixels or sum over them.
_FLOAT32 = (
    tf.keras.layers.Rescaling,
    tf.keras.layers.Normalization,
    tf.keras.layers.GlobalAveragePooling2D,
    tf.keras.layers.GlobalMaxPooling2D,
)


def keras_application(name: str, num_classes: int, image_size: int, *, policy: str) -> tf.keras.Model:
    """A classifier of `tf.keras.applications` with fresh weights and its own preprocessing.

    Args:
      name: name in `tf.keras.applications`.
      num_classes: C.
      image_size: S in pixels.
      policy: Keras's policy for the layers between the preprocessing and the head, which are float32.

    Returns:
      A model from `image` float32 [B, S, S, 3] in 0..255 to float32 logits [B, C].

    Raises:
      UserError: the model does not accept images of this size.
    """
    build = getattr(tf.keras.applications, name)
    preprocess = sys.modules[build.__module__].preprocess_input
    if name.startswith("EfficientNetB"):
        preprocess = _normalize
    image = tf.keras.Input((image_size, image_size, 3), dtype=tf.float32, name="image")
    try:
        model = build(
            input_shape=(image_size, image_size, 3),
            input_tensor=_preprocess(image, preprocess),
            weights=None,
            classes=num_classes,
            classifier_activation=None,
        )
    except ValueError as error:
        raise UserError(
            f"`image_size`={image_size}: {KERAS_PREFIX}{name} does not accept it: {first_line(error)}"
        ) from error
    last = head_layer(model)
    # Keras warns when it saves that of its EfficientNetV2.
    last.bias_initializer = tf.keras.initializers.Zeros()
    if policy == "float32":
        return model
    head = {layer.name for layer in model.layers[model.layers.index(last) :]}

    def change(layer: tf.keras.layers.Layer, config: dict[str, Any]) -> dict[str, Any]:
        # Operations such as `x + y` have the type of their inputs.
        if "function" not in config and not isinstance(layer, _FLOAT32) and layer.name not in head:
            config["dtype"] = policy
        return config

    return rebuild(model, change)


def _normalize(pixels: np.ndarray) -> np.ndarray:
    return (pixels - 255 * _MEAN) / _DEVIATION


def _preprocess(image: tf.Tensor, preprocess: Callable[[np.ndarray], np.ndarray]) -> tf.Tensor:
    """Applies the model's `preprocess_input`, which has no layer, as a layer: scale and offset per channel, and channel order."""
    offset = preprocess(np.zeros([1, 1, 1, 3])).reshape(3)  # float64
    # What one unit of each channel becomes: rows are inputs, columns outputs.
    matrix = ((preprocess(255 * np.eye(3).reshape(1, 1, 3, 3)).reshape(3, 3) - offset) / 255).round(12)
    if not matrix.diagonal().all():
        image = tf.reverse(image, axis=[-1])  # to BGR
        matrix = matrix[::-1]
    scale = matrix.diagonal()
    if (scale == 1).all() and not offset.any():
        return image  # the preprocessing is part of the model
    scale, offset = (
        values[0].item() if (values == values[0]).all() else values.tolist() for values in (scale, offset)
    )
    return tf.keras.layers.Rescaling(scale, offset=offset, dtype=tf.float32, name="scale")(image)
