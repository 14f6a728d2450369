"""Codecs of logits in records.

Each codec is implemented twice: `encode` and `decode` in NumPy for precompute and replay, `round_trip` in TensorFlow for the
logits of an online teacher (design, invariant 8). Both give the same bits, also under XLA. XLA fuses a multiplication and an
addition into one rounding, so products here are exact in float32. XLA and Grappler turn a division by a constant into a
multiplication, so there is none.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from pipeline.cli.choices import check_codec
from pipeline.errors import DataError, UserError

Encoded = dict[str, np.ndarray]  # column of a record to its values for n views, [n, ...]


def make_codec(name: str, num_classes: int, *, temperature: float) -> Codec:
    """Makes a codec.

    Args:
      name: one of `CODECS`, with a number for K.
      num_classes: number of classes C.
      temperature: temperature at which a `topk` codec keeps the softmax mass of the other classes.

    Raises:
      UserError: the name is unknown, or K does not fit the number of classes.
    """
    check_codec(name)
    if name in _PLAIN:
        return _PLAIN[name](name, num_classes)
    return TopKCodec(name, num_classes, temperature=temperature)


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a record: a scalar, or an array as little-endian bytes.

    Attributes:
      dtype: type of the values; float32 for a scalar.
      size: length of the array; None for a scalar.
    """

    dtype: np.dtype[Any]
    size: int | None = None

    @property
    def bytes(self) -> int:
        """Bytes per view before compression."""
        return self.dtype.itemsize * (1 if self.size is None else self.size)

    def feature(self) -> Any:
        """The TFDS feature of the column."""
        if self.size is None:
            return self.dtype.type
        return tfds.features.Tensor(
            shape=(self.size,), dtype=self.dtype.type, encoding=tfds.features.Encoding.BYTES
        )


@dataclasses.dataclass(frozen=True)
class Codec(abc.ABC):
    """Encodes logits as columns of a record, and decodes them.

    Attributes:
      name: name, such as `topk:16`.
      num_classes: number of classes C.
    """

    name: str
    num_classes: int

    @property
    @abc.abstractmethod
    def columns(self) -> dict[str, Column]:
        """Columns of the encoded logits, `logits` first."""

    @abc.abstractmethod
    def _encode(self, logits: np.ndarray) -> Encoded:
        """Encodes finite logits float32 [n, C]; columns are not finite if a logit does not fit."""

    @abc.abstractmethod
    def decode(self, encoded: Encoded) -> np.ndarray:
        """Decodes columns to logits float32 [n, C].

        Raises:
          ValueError: the columns cannot come from `encode`.
        """

    @abc.abstractmethod
    def round_trip(self, logits: tf.Tensor) -> tf.Tensor:
        """Computes `decode(encode(logits))` of online logits float32 [B, C] in a graph (design, invariant 8)."""

    @abc.abstractmethod
    def allowed_difference(self, logits: np.ndarray, slack: np.ndarray) -> np.ndarray:
        """Largest difference of decoded logits, if the logits before the codec differ by at most `slack`.

        Args:
          logits: one of the two, before the codec, float32 [n, C].
          slack: float32 [n, 1].

        Returns:
          float32 [n, C].
        """

    @property
    def largest(self) -> float:
        """Largest absolute value of a logit that fits."""
        return float(np.finfo(np.float32).max)

    @property
    def only_temperature(self) -> float | None:
        """The only temperature at which decoded logits keep the teacher's softmax; None for any temperature."""
        return None

    @property
    def bytes_per_view(self) -> int:
        """Bytes of the encoded logits per view, before compression."""
        return sum(column.bytes for column in self.columns.values())

    def features(self) -> dict[str, Any]:
        """TFDS features of the encoded logits."""
        return {name: column.feature() for name, column in self.columns.items()}

    def encode(self, logits: np.ndarray, *, first_view: int | None = None) -> Encoded:
        """Encodes logits float32 [n, C] as columns of n records.

        Args:
          logits: logits of n consecutive views.
          first_view: index of the first view, for errors.

        Raises:
          DataError: a logit does not fit, or is not finite.
        """
        unfit = ~np.isfinite(logits)
        if not unfit.any():
            with np.errstate(over="ignore", invalid="ignore"):  # reported below, with the number
                encoded = self._encode(logits)
            if all(np.isfinite(column).all() for column in encoded.values()):
                return encoded
            unfit = np.abs(logits) > self.largest
        # If no logit is marked, the range of a view is too wide.
        row, column = (
            np.argwhere(unfit)[0] if unfit.any() else np.divmod(np.abs(logits).argmax(), self.num_classes)
        )
        where = "" if first_view is None else f"view {first_view + row}: "
        raise DataError(
            f"{where}teacher logit {logits[row, column]:g} does not fit `codec`={self.name}, expected at most "
            f"{self.largest:g}; use `codec`=float32"
        )


@dataclasses.dataclass(frozen=True)
class FloatCodec(Codec):
    """Logits as floating-point numbers of `float_type`."""

    float_type: ClassVar[tf.DType]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Little-endian type of a stored logit."""
        return np.dtype(self.float_type.as_numpy_dtype).newbyteorder("<")

    @property
    def columns(self) -> dict[str, Column]:
        return {"logits": Column(self.dtype, self.num_classes)}

    @property
    def largest(self) -> float:
        return float(self.float_type.max)

    def _encode(self, logits: np.ndarray) -> Encoded:
        return {"logits": logits.astype(self.dtype)}

    def decode(self, encoded: Encoded) -> np.ndarray:
        return _finite(encoded["logits"].astype(np.float32))

    def round_trip(self, logits: tf.Tensor) -> tf.Tensor:
        return tf.cast(tf.cast(logits, self.float_type), tf.float32)

    def allowed_difference(self, logits: np.ndarray, slack: np.ndarray) -> np.ndarray:
        return slack + _one_place(np.abs(logits) + slack, self.float_type)


class Float32Codec(FloatCodec):
    """Logits as the teacher returned them."""

    float_type = tf.float32

    def allowed_difference(self, logits: np.ndarray, slack: np.ndarray) -> np.ndarray:
        return np.broadcast_to(slack, logits.shape)


class BFloat16Codec(FloatCodec):
    """Logits in bfloat16."""

    float_type = tf.bfloat16


class Float16Codec(FloatCodec):
    """Logits in float16."""

    float_type = tf.float16


@dataclasses.dataclass(frozen=True)
class Int8Codec(Codec):
    """Logits as 256 evenly spaced values between the smallest and the largest logit of the view.

    Columns: `logits` int8 [C], `logits_scale` and `logits_offset` float32. A logit is `offset + scale * code`.
    """

    @property
    def columns(self) -> dict[str, Column]:
        scalar = Column(np.dtype("<f4"))
        return {
            "logits": Column(np.dtype(np.int8), self.num_classes),
            "logits_scale": scalar,
            "logits_offset": scalar,
        }

    # The scale has 16 significant bits, so its product with an 8-bit code is exact. It is rounded up, so the largest logit
    # has code 127. The least scale is for equal logits, and far above the denormals, which TensorFlow flushes to 0.
    _SHARE, _LOW_BITS, _LEAST = np.float32(1 / 255), 0xFF, np.float32(2.0**-100)

    def _encode(self, logits: np.ndarray) -> Encoded:
        least = logits.min(axis=1, keepdims=True)
        width = (logits.max(axis=1, keepdims=True) - least) * self._SHARE
        bits = (width.view(np.int32) + np.int32(self._LOW_BITS)) & np.int32(~self._LOW_BITS)
        scale = np.maximum(bits.view(np.float32), self._LEAST)
        offset = least + np.float32(128) * scale
        codes = np.clip(np.rint((logits - offset) / scale), -128, 127)
        if not np.isfinite(scale).all():
            codes = np.zeros_like(codes)  # the caller refuses the scale
        return {
            "logits": codes.astype(np.int8),
            "logits_scale": scale[:, 0],
            "logits_offset": offset[:, 0],
        }

    def decode(self, encoded: Encoded) -> np.ndarray:
        scale, offset = encoded["logits_scale"], encoded["logits_offset"]
        decoded = encoded["logits"].astype(np.float32)
        decoded *= scale[:, np.newaxis]
        decoded += offset[:, np.newaxis]
        return _finite(decoded)

    def round_trip(self, logits: tf.Tensor) -> tf.Tensor:
        least = tf.reduce_min(logits, axis=1, keepdims=True)
        width = (tf.reduce_max(logits, axis=1, keepdims=True) - least) * self._SHARE
        bits = tf.bitwise.bitwise_and(tf.bitcast(width, tf.int32) + self._LOW_BITS, ~self._LOW_BITS)
        scale = tf.maximum(tf.bitcast(bits, tf.float32), self._LEAST)
        offset = least + 128.0 * scale
        codes = tf.clip_by_value(tf.round((logits - offset) / scale), -128.0, 127.0)
        return offset + scale * codes

    def allowed_difference(self, logits: np.ndarray, slack: np.ndarray) -> np.ndarray:
        step = (np.ptp(logits, axis=1, keepdims=True) + 2 * slack) * np.float32(1.001 / 255)
        return np.broadcast_to(
            slack + step + _one_place(np.abs(logits).max(axis=1, keepdims=True), tf.float32), logits.shape
        )


@dataclasses.dataclass(frozen=True)
class TopKCodec(Codec):
    """The K largest logits, and the softmax mass of all others at one temperature, which is decoded as equal logits.

    Columns: `logits` float16 [K], largest first; `logits_classes` uint16 [K], their classes (int32 for more than 65,536
    classes); `logits_rest` float32, the log of the sum of `exp(logit / temperature)` over the other C - K classes. Each of
    those is decoded to `temperature * (rest - log(C - K))`.

    Attributes:
      temperature: temperature at which the mass is kept.
    """

    temperature: float = dataclasses.field(kw_only=True)

    def __post_init__(self) -> None:
        if self.count >= self.num_classes:
            raise UserError(
                f"`codec`={self.name}: expected fewer than the {self.num_classes} classes; use a smaller number or another codec"
            )

    @property
    def count(self) -> int:
        """K."""
        return int(self.name.removeprefix("topk:"))

    @property
    def only_temperature(self) -> float:
        return self.temperature

    @property
    def largest(self) -> float:
        return float(tf.float16.max)

    @property
    def columns(self) -> dict[str, Column]:
        index = np.dtype("<u2" if self.num_classes <= 2**16 else "<i4")
        return {
            "logits": Column(np.dtype("<f2"), self.count),
            "logits_classes": Column(index, self.count),
            "logits_rest": Column(np.dtype("<f4")),
        }

    @property
    def _log_others(self) -> float:
        return float(np.log(self.num_classes - self.count))

    def _encode(self, logits: np.ndarray) -> Encoded:
        order = np.argsort(
            -logits, axis=1, kind="stable"
        )  # equal logits in the order of classes, as in TensorFlow
        ranked = np.take_along_axis(logits, order, axis=1)
        rest = ranked[:, self.count :].astype(np.float64)
        mass = np.exp((rest - rest[:, :1]) / self.temperature).sum(axis=1)
        columns = self.columns
        return {
            "logits": ranked[:, : self.count].astype(columns["logits"].dtype),
            "logits_classes": order[:, : self.count].astype(columns["logits_classes"].dtype),
            "logits_rest": (rest[:, 0] / self.temperature + np.log(mass)).astype(np.float32),
        }

    def _each_rest(self, rest: np.ndarray) -> np.ndarray:
        """Decodes `logits_rest` float32 [n] to the logit of each other class, float32 [n, 1]."""
        # In float64 like the mass, because exp and log differ in the last bits between NumPy, TensorFlow and XLA.
        each = (rest.astype(np.float64) - self._log_others) * self.temperature
        return each.astype(np.float32)[:, np.newaxis]

    def decode(self, encoded: Encoded) -> np.ndarray:
        classes = encoded["logits_classes"]
        if len(classes) and (classes.max() >= self.num_classes or classes.min() < 0):
            raise ValueError(f"class {classes.max()} of {self.num_classes}")
        decoded = np.empty((len(classes), self.num_classes), np.float32)
        decoded[:] = self._each_rest(encoded["logits_rest"])
        np.put_along_axis(decoded, classes.astype(np.int64), encoded["logits"].astype(np.float32), axis=1)
        return _finite(decoded)

    def round_trip(self, logits: tf.Tensor) -> tf.Tensor:
        ranked, order = tf.math.top_k(logits, k=self.num_classes)
        rest = tf.cast(ranked[:, self.count :], tf.float64)
        mass = tf.reduce_sum(tf.exp((rest - rest[:, :1]) / self.temperature), axis=1)
        stored = tf.cast(rest[:, 0] / self.temperature + tf.math.log(mass), tf.float32)
        each = tf.cast((tf.cast(stored, tf.float64) - self._log_others) * self.temperature, tf.float32)
        values = tf.cast(tf.cast(ranked[:, : self.count], tf.float16), tf.float32)
        # Sums instead of tf.broadcast_to, which has a dynamic shape in XLA. places: [B, K, 2], indices into [B, C].
        rows = tf.range(tf.shape(logits)[0])[:, tf.newaxis] + tf.zeros_like(order[:, : self.count])
        places = tf.stack([rows, order[:, : self.count]], axis=-1)
        return tf.tensor_scatter_nd_update(tf.zeros_like(logits) + each[:, tf.newaxis], places, values)

    def allowed_difference(self, logits: np.ndarray, slack: np.ndarray) -> np.ndarray:
        ranked = -np.sort(-logits, axis=1)
        last, first_rest = ranked[:, self.count - 1 : self.count], ranked[:, self.count : self.count + 1]
        each = self._each_rest(self._encode(logits)["logits_rest"])
        # The rest changes with its logits, and if classes move between the K and the rest.
        allowed = 4 * slack + _one_place(np.abs(logits) + slack, tf.float16)
        either = (logits <= first_rest + 2 * slack) & (logits >= last - 2 * slack)
        return allowed + np.where(either, np.abs(logits - each), np.float32(0))


_PLAIN: dict[str, type[Codec]] = {
    "float32": Float32Codec,
    "bfloat16": BFloat16Codec,
    "float16": Float16Codec,
    "int8": Int8Codec,
}


def _finite(decoded: np.ndarray) -> np.ndarray:
    """Returns decoded logits if all are finite.

    Raises:
      ValueError: one is not, which cannot come from `encode`.
    """
    if not np.isfinite(decoded).all():
        raise ValueError("a logit that is not finite")
    return decoded


def _one_place(magnitude: np.ndarray, dtype: tf.DType) -> np.ndarray:
    """Twice the largest rounding error of numbers up to `magnitude`, float32 in the same shape."""
    info = np.finfo(np.float16) if dtype == tf.float16 else np.finfo(np.float32)
    digits = 8 if dtype == tf.bfloat16 else info.nmant + 1
    return magnitude * np.float32(2.0 ** (1 - digits)) + np.float32(info.smallest_subnormal)
