"""Two students for a machine without an accelerator: pre-activation residual nets (He et al. 2016, v2).

They use group normalization (Wu and He 2018) instead of batch normalization, so that the logits of a view depend neither
on the batch nor on the number of replicas. An early stride makes them fast.
"""

from __future__ import annotations

import tensorflow as tf

_GROUPS = 8


class GroupNormalization(tf.keras.layers.GroupNormalization):
    """Keras's group normalization, bit for bit, with static shapes: float [B, H, W, D] to [B, H, W, D].

    Keras's own layer multiplies by a mask of ones, whose shape TFLite cannot broadcast, and reads all shapes at
    run time. This class has the name of Keras's layer and is not registered, so that any process can load a saved
    student, with Keras's layer in its place.
    """

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        height, width, channels = inputs.shape[1:]
        shape = [self.groups, channels // self.groups]
        # [B, H, W, D] to [B, H * W, G, D / G]: four dimensions, the most that TFLite can broadcast.
        x = tf.reshape(inputs, [-1, height * width, *shape])
        # The division of tf.nn.weighted_moments; a plain division by a constant becomes a multiplication, which rounds
        # differently.
        count = tf.constant(height * width * shape[1], x.dtype)
        mean = tf.math.divide_no_nan(tf.reduce_sum(x, axis=[1, 3], keepdims=True), count)
        deviations = tf.math.squared_difference(x, mean)
        variance = tf.math.divide_no_nan(tf.reduce_sum(deviations, axis=[1, 3], keepdims=True), count)
        scale, offset = (tf.reshape(weight, [1, 1, *shape]) for weight in (self.gamma, self.beta))
        x = tf.nn.batch_normalization(x, mean, variance, offset, scale, self.epsilon)
        return tf.reshape(x, [-1, height, width, channels])


def tiny(num_classes: int, image_size: int) -> tf.keras.Model:
    """A student for 32 x 32 images: 77,850 parameters with 10 classes. See `_residual_net`."""
    return _residual_net(
        "tiny", num_classes=num_classes, image_size=image_size, stem=(3, 2), widths=(16, 32, 64)
    )


def small(num_classes: int, image_size: int) -> tf.keras.Model:
    """A student for 128 x 128 images: 457,526 parameters with 102 classes. See `_residual_net`."""
    return _residual_net(
        "small", num_classes=num_classes, image_size=image_size, stem=(4, 4), widths=(24, 48, 96, 128)
    )


def _residual_net(
    name: str, *, num_classes: int, image_size: int, stem: tuple[int, int], widths: tuple[int, ...]
) -> tf.keras.Model:
    """A stem and one residual block per width, the first at the stem's resolution, the others halving it.

    The network's value range is -1..1; its first layer scales from 0..255.

    Args:
      stem: Kernel size and stride of the first convolution.
      widths: Channels of the blocks, multiples of 8.

    Returns:
      A model from `image` float32 [B, S, S, 3] in 0..255 to float32 logits [B, C].
    """
    image = tf.keras.Input((image_size, image_size, 3), dtype=tf.float32, name="image")
    x = tf.keras.layers.Rescaling(1 / 127.5, offset=-1, dtype=tf.float32, name="scale")(image)
    x = _convolution(x, widths[0], size=stem[0], stride=stem[1], name="stem")
    for number, width in enumerate(widths):
        x = _block(x, width, stride=1 if number == 0 else 2, name=f"block{number}")
    x = _norm_relu(x, "final")
    x = tf.keras.layers.GlobalAveragePooling2D(dtype=tf.float32, name="pool")(x)
    logits = tf.keras.layers.Dense(num_classes, dtype=tf.float32, name="predictions")(x)
    return tf.keras.Model(image, logits, name=name)


def _block(x: tf.Tensor, width: int, *, stride: int, name: str) -> tf.Tensor:
    """A residual block, [B, H, W, D] to [B, H / stride, W / stride, width], rounded up."""
    y = _norm_relu(x, f"{name}_1")
    if stride > 1 or x.shape[-1] != width:
        x = _convolution(y, width, size=1, stride=stride, name=f"{name}_shortcut")
    y = _convolution(y, width, size=3, stride=stride, name=f"{name}_1_conv")
    y = _norm_relu(y, f"{name}_2")
    y = _convolution(y, width, size=3, stride=1, name=f"{name}_2_conv")
    return tf.keras.layers.Add(name=f"{name}_add")([x, y])


def _norm_relu(x: tf.Tensor, name: str) -> tf.Tensor:
    # Always float32: otherwise its moments would be summed in bfloat16.
    x = GroupNormalization(_GROUPS, dtype=tf.float32, name=f"{name}_norm")(x)
    return tf.keras.layers.ReLU(name=f"{name}_relu")(x)


def _convolution(x: tf.Tensor, width: int, *, size: int, stride: int, name: str) -> tf.Tensor:
    return tf.keras.layers.Conv2D(
        width,
        size,
        strides=stride,
        padding="same",
        use_bias=False,
        kernel_initializer="he_normal",
        name=name,
    )(x)
