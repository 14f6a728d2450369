"""BiT: ResNet v2 with group normalization and weight standardization (Kolesnikov et al. 2020, arXiv 1912.11370).

Teacher and student of function matching. Layers and variables have big_vision's names of the published checkpoints
(`block1/unit01/conv1/kernel`, `norm-pre-head/scale`, ... of `bit_paper`), so that `PublishedWeights` fills a model by
name.

Both normalizations are layers of this module. Keras's own group normalization computes the variance as the mean of
squares minus the squared mean, which cancels, and multiplies by a mask of ones. The published one, and this one, average
squared differences.
"""

from __future__ import annotations

import functools
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from pipeline.errors import DataError, UserError

BLOCK_UNITS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}  # depth -> units of the four blocks
WIDTHS = (1, 2, 3)
HEAD = "head"

_GROUPS = 32
_GROUP_NORM_EPSILON = 1e-5
_STANDARDIZATION_EPSILON = 1e-10
_PACKAGE = "view_distill"  # where Keras looks the layers up when it loads a SavedModel


@tf.keras.utils.register_keras_serializable(_PACKAGE)
class GroupNorm(tf.keras.layers.Layer):
    """Group normalization (Wu and He 2018) over 32 groups: float [B, H, W, D] to float32 [B, H, W, D].

    The variance is the mean of squared differences (biased, two passes). With `dtype=float32`, the layer computes in
    float32 at any precision of its inputs.
    """

    def __init__(self, epsilon: float = _GROUP_NORM_EPSILON, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.epsilon = epsilon

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {**super().get_config(), "epsilon": self.epsilon}

    def build(self, input_shape: tf.TensorShape) -> None:
        """Creates `scale` and `bias`, float32 [D]; D is a multiple of 32."""
        channels = int(input_shape[-1])
        self.scale = self.add_weight("scale", [channels], initializer="ones")
        self.bias = self.add_weight("bias", [channels], initializer="zeros")
        super().build(input_shape)

    def call(self, x: tf.Tensor) -> tf.Tensor:
        centered = x - _group_mean(x)
        variance = _group_mean(tf.square(centered))
        return centered * (tf.math.rsqrt(variance + self.epsilon) * self.scale) + self.bias


def _group_mean(x: tf.Tensor) -> tf.Tensor:
    """Mean over the pixels and channels of each group: [B, H, W, D] to [B, 1, 1, D]."""
    channels = x.shape[-1]
    means = tf.reduce_mean(x, axis=[1, 2])  # [B, D]: over pixels first, which keeps the memory layout
    groups = tf.reduce_mean(tf.reshape(means, [-1, _GROUPS, channels // _GROUPS]), axis=2)  # [B, 32]
    return tf.repeat(groups, channels // _GROUPS, axis=1)[:, tf.newaxis, tf.newaxis]


@tf.keras.utils.register_keras_serializable(_PACKAGE)
class StandardizedConv2D(tf.keras.layers.Layer):
    """A convolution without bias whose kernel is standardized per output channel (Qiao et al. 2019).

    The kernel is stored and standardized in float32, with biased variance; the convolution runs in the layer's compute
    precision. It pads `size // 2` zeros on every side. `same` at stride 2 would pad an even image only at its end.

    Args:
      size: Side of the kernel in pixels, odd.
    """

    def __init__(self, filters: int, size: int, *, stride: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.filters, self.size, self.stride = filters, size, stride

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {**super().get_config(), "filters": self.filters, "size": self.size, "stride": self.stride}

    def build(self, input_shape: tf.TensorShape) -> None:
        """Creates `kernel`, float32 [size, size, D, filters]."""
        self.kernel = self.add_weight(
            "kernel",
            [self.size, self.size, int(input_shape[-1]), self.filters],
            initializer="lecun_normal",
            experimental_autocast=False,  # float32 also under mixed precision
        )
        super().build(input_shape)

    def call(self, x: tf.Tensor) -> tf.Tensor:
        kernel = tf.cast(standardize_kernel(self.kernel), self.compute_dtype)
        around = [self.size // 2] * 2
        padding: Any = [[0, 0], around, around, [0, 0]]
        if self.stride == 1 or self.size == 1:  # equivalent, and the case that kernels are optimized for
            padding = "SAME" if self.size > 1 else "VALID"
        return tf.nn.conv2d(x, kernel, strides=self.stride, padding=padding)


def standardize_kernel(kernel: tf.Tensor) -> tf.Tensor:
    """Scales a kernel to zero mean and unit variance per output channel: float32 [h, w, D, F] to the same."""
    centered = kernel - tf.reduce_mean(kernel, axis=[0, 1, 2], keepdims=True)
    variance = tf.reduce_mean(tf.square(centered), axis=[0, 1, 2], keepdims=True)
    return centered * tf.math.rsqrt(variance + _STANDARDIZATION_EPSILON)


def bit(
    num_classes: int,
    image_size: int,
    *,
    depth: int | tuple[int, ...] = 50,
    width: int = 1,
    name: str | None = None,
) -> tf.keras.Model:
    """A BiT-ResNet v2; 23,709,350 parameters at depth 50, width 1 and 102 classes.

    The network's value range is -1..1; its first layer scales from 0..255. The head is initialized to zero. The
    root's pooling pads with zeros, as do the models published with the paper (big_transfer's TF2 and PyTorch code; the
    latter notes that it matters). big_vision's `bit_paper` pads with minus infinity instead. The two differ at the
    border of the image where a whole window is negative.

    Args:
      depth: A key of `BLOCK_UNITS`, or the number of units of each block.
      width: Factor of all channels; the root has 64 times it.
      name: Name of the model; by default such as `bit_r50x1`.

    Returns:
      A model from `image` float32 [B, S, S, 3] in 0..255 to float32 logits [B, C].
    """
    units = BLOCK_UNITS[depth] if isinstance(depth, int) else depth
    image = tf.keras.Input((image_size, image_size, 3), dtype=tf.float32, name="image")
    x = tf.keras.layers.Rescaling(1 / 127.5, offset=-1, dtype=tf.float32, name="scale")(image)
    x = StandardizedConv2D(64 * width, 7, stride=2, name="root_block/conv_root")(x)
    x = tf.keras.layers.ZeroPadding2D(1, name="root_block/pad")(x)
    x = tf.keras.layers.MaxPool2D(3, strides=2, name="root_block/pool")(x)
    for block, count in enumerate(units):
        for unit in range(count):
            stride = 2 if block and not unit else 1
            x = _unit(x, 64 * width << block, stride=stride, name=f"block{block + 1}/unit{unit + 1:02d}")
    x = _norm_relu(x, "norm-pre-head")
    x = tf.keras.layers.GlobalAveragePooling2D(dtype=tf.float32, name="pool")(x)
    logits = tf.keras.layers.Dense(num_classes, kernel_initializer="zeros", dtype=tf.float32, name=HEAD)(x)
    depth_name = depth if isinstance(depth, int) else "-".join(map(str, units))
    return tf.keras.Model(image, logits, name=name or f"bit_r{depth_name}x{width}")


def _unit(x: tf.Tensor, channels: int, *, stride: int, name: str) -> tf.Tensor:
    """A pre-activation bottleneck: [B, H, W, D] to [B, H / stride, W / stride, 4 * channels], rounded up."""
    y = _norm_relu(x, f"{name}/gn1")
    if stride > 1 or x.shape[-1] != 4 * channels:  # projects the normalized input, not x
        x = StandardizedConv2D(4 * channels, 1, stride=stride, name=f"{name}/conv_proj")(y)
    y = StandardizedConv2D(channels, 1, name=f"{name}/conv1")(y)
    y = _norm_relu(y, f"{name}/gn2")
    y = StandardizedConv2D(channels, 3, stride=stride, name=f"{name}/conv2")(y)
    y = _norm_relu(y, f"{name}/gn3")
    y = StandardizedConv2D(4 * channels, 1, name=f"{name}/conv3")(y)
    return tf.keras.layers.Add(name=f"{name}/add")([x, y])


def _norm_relu(x: tf.Tensor, name: str) -> tf.Tensor:
    return tf.keras.layers.ReLU(name=f"{name}/relu")(GroupNorm(dtype=tf.float32, name=name)(x))


BIT_MODELS: dict[str, Callable[[int, int], tf.keras.Model]] = {
    f"bit_r{depth}x{width}": functools.partial(bit, depth=depth, width=width)
    for depth in BLOCK_UNITS
    for width in WIDTHS
}


# Names in the paper's own files (`gs://bit_models/BiT-M-R50x1.npz`), and big_vision's names for them.
_UNIT = r"resnet/(block\d+/unit\d+)/"
_CONVOLUTION = r"standardized_conv2d(?:_\d+)?/kernel"
_PAPER_NAMES: tuple[tuple[str, Callable[[re.Match[str]], str]], ...] = (
    (rf"resnet/root_block/{_CONVOLUTION}", lambda _: "root_block/conv_root/kernel"),
    (rf"{_UNIT}a/proj/{_CONVOLUTION}", lambda m: f"{m[1]}/conv_proj/kernel"),
    (rf"{_UNIT}([abc])/{_CONVOLUTION}", lambda m: f"{m[1]}/conv{'abc'.index(m[2]) + 1}/kernel"),
    (rf"{_UNIT}([abc])/group_norm/gamma", lambda m: f"{m[1]}/gn{'abc'.index(m[2]) + 1}/scale"),
    (rf"{_UNIT}([abc])/group_norm/beta", lambda m: f"{m[1]}/gn{'abc'.index(m[2]) + 1}/bias"),
    (r"resnet/group_norm/gamma", lambda _: "norm-pre-head/scale"),
    (r"resnet/group_norm/beta", lambda _: "norm-pre-head/bias"),
    (r"resnet/head/conv2d/(kernel|bias)", lambda m: f"{HEAD}/{m[1]}"),
)


def _published_name(name: str) -> str:
    """big_vision's name for an array of the paper's files; any other name unchanged."""
    for pattern, rename in _PAPER_NAMES:
        if match := re.fullmatch(pattern, name):
            return rename(match)
    return name


class PublishedWeights:
    """The arrays of a BiT `.npz`, published by the paper or by big_vision, under big_vision's names.

    Of a big_vision checkpoint, which may hold more than parameters, only `params/...` or `opt/target/...` is used.

    Raises:
      UserError: there is no such file, or it is not a `.npz`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._keys: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        try:
            with zipfile.ZipFile(self.path) as archive:
                members = [name.removesuffix(".npy") for name in archive.namelist()]
                prefix = next(
                    (p for p in ("params/", "opt/target/") if any(m.startswith(p) for m in members)), ""
                )
                for key in (member for member in members if member.startswith(prefix)):
                    name = _published_name(key.removeprefix(prefix))
                    self._keys[name], self.shapes[name] = key, _read_shape(archive, f"{key}.npy")
        except FileNotFoundError as error:
            raise UserError(f"{path}: no such file; expected a BiT checkpoint, NAME.npz") from error
        except (zipfile.BadZipFile, ValueError, IsADirectoryError) as error:
            raise UserError(f"{path}: cannot be read as .npz ({error}); expected a BiT checkpoint") from error

    @property
    def num_classes(self) -> int | None:
        """C of the head; None if there is no head."""
        shape = self.shapes.get(f"{HEAD}/kernel")
        return None if shape is None else shape[-1]

    def load_into(self, model: tf.keras.Model, *, new_head: bool = False) -> None:
        """Assigns every variable of a model that `bit` built.

        Names and shapes are checked before the first assignment.

        Args:
          model: Model of the same depth and width, float32.
          new_head: Whether to leave the head unchanged.

        Raises:
          UserError: an array is missing or unexpected, or has another shape or type.
          DataError: an array is damaged or contains a number that is not finite.
        """
        variables = {
            f"{layer.name}/{variable.name.split('/')[-1].split(':')[0]}": variable
            for layer in model.layers
            for variable in layer.weights
            if not (new_head and layer.name == HEAD)
        }
        self._check(
            model.name, {name: tuple(variable.shape) for name, variable in variables.items()}, new_head
        )
        with np.load(self.path, allow_pickle=False) as arrays:
            for name, variable in variables.items():  # one at a time: R101x3 is 1.5 GB
                variable.assign(self.read(arrays, name).reshape(variable.shape))

    def _check(self, model: str, expected: dict[str, tuple[int, ...]], new_head: bool) -> None:
        """Compares names and shapes."""
        wrong = []
        for name, shape in expected.items():
            if name not in self.shapes:
                hint = "; pass --new_head to start with a zero head" if name.startswith(f"{HEAD}/") else ""
                wrong.append(f"{name} is missing, expected {shape}{hint}")
            elif without_leading_ones(self.shapes[name], len(shape)) != shape:
                hint = "; pass --new_head for another number of classes" if name.startswith(HEAD) else ""
                wrong.append(f"{name} has shape {self.shapes[name]}, expected {shape}{hint}")
        for name, shape in self.shapes.items():
            if name not in expected and not (new_head and name.startswith(f"{HEAD}/")):
                wrong.append(f"{self._keys[name]} {shape} is not an array of the model")
        if wrong:
            more = f" (and {len(wrong) - 1} more differences)" if len(wrong) > 1 else ""
            raise UserError(f"{self.path} does not fit {model}: {wrong[0]}{more}")

    def read(self, arrays: Any, name: str) -> np.ndarray:
        """Reads one array.

        Args:
          arrays: what `np.load` returns for the file.
          name: name in `shapes`.

        Raises:
          UserError: the array has another type than float.
          DataError: the array is damaged or contains a number that is not finite.
        """
        try:
            array = np.asarray(arrays[self._keys[name]])
        except (zipfile.BadZipFile, ValueError, OSError) as error:
            raise DataError(f"{self.path}: {self._keys[name]} is damaged: {error}") from error
        if array.dtype.kind != "f":
            raise UserError(f"{self.path}: {self._keys[name]} is {array.dtype}, expected a float type")
        if not np.isfinite(array).all():
            raise DataError(f"{self.path}: {self._keys[name]} contains a number that is not finite")
        return array


def _read_shape(archive: zipfile.ZipFile, member: str) -> tuple[int, ...]:
    """An array's shape from its header, without reading the array."""
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        read = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, _, _ = read(file)
    return tuple(shape)


def without_leading_ones(shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """Drops leading ones, such as (1, 1, 1, D) to (D,): scales and heads are published with the rank of an image."""
    while len(shape) > rank and shape[0] == 1:
        shape = shape[1:]
    return shape
