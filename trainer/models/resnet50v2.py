"""Keras's own ResNet50V2, the student of the Keras example."""

from __future__ import annotations

import tensorflow as tf

from pipeline.errors import UserError

_SMALLEST_IMAGE = 32  # tf.keras.applications refuses smaller ones


def resnet50v2(num_classes: int, image_size: int) -> tf.keras.Model:
    """ResNet50V2 from scratch: 23,773,798 parameters with 102 classes.

    The network's value range is -1..1, that of `tf.keras.applications.resnet_v2.preprocess_input`; its first layer
    scales from 0..255. Its batch normalization covers the batch of one replica.

    Returns:
      A model from `image` float32 [B, S, S, 3] in 0..255 to float32 logits [B, C].

    Raises:
      UserError: the image is too small.
    """
    if image_size < _SMALLEST_IMAGE:
        raise UserError(
            f"`image_size`={image_size}: resnet50v2 takes images of {_SMALLEST_IMAGE} pixels or more"
        )
    image = tf.keras.Input((image_size, image_size, 3), dtype=tf.float32, name="image")
    scaled = tf.keras.layers.Rescaling(1 / 127.5, offset=-1, dtype=tf.float32, name="scale")(image)
    # Pooling and head are added here, so that they stay float32 under mixed precision. So do the moments of Keras's
    # batch normalization, whose fused kernel takes bfloat16 images and keeps float32 statistics.
    body = tf.keras.applications.ResNet50V2(include_top=False, weights=None, input_tensor=scaled)
    pooled = tf.keras.layers.GlobalAveragePooling2D(dtype=tf.float32, name="avg_pool")(body.output)
    logits = tf.keras.layers.Dense(num_classes, dtype=tf.float32, name="predictions")(pooled)
    return tf.keras.Model(image, logits, name="resnet50v2")
