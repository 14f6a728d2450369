"""How teacher logits are held in a record, and what that costs in accuracy."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from pipeline.errors import DataError, UserError

CODECS = ("float32", "float16")


def check_codec(name: str) -> None:
    """Raises UserError unless there is a codec of that name."""
    if name not in CODECS:
        raise UserError(f"--codec={name}: expected one of {', '.join(CODECS)}")


@dataclasses.dataclass(frozen=True)
class Codec:
    """Logits as plain floating-point numbers of one width.

    Attributes:
      name: `float32` or `float16`.
      num_classes: C.
    """

    name: str
    num_classes: int

    def __post_init__(self) -> None:
        check_codec(self.name)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of a stored logit, little-endian."""
        return np.dtype(self.name).newbyteorder("<")

    def features(self) -> dict[str, tfds.features.FeatureConnector]:
        """TFDS features that a record has for its logits."""
        return {
            "logits": tfds.features.Tensor(
                shape=(self.num_classes,),
                dtype=np.dtype(self.name).type,
                encoding=tfds.features.Encoding.BYTES,
            )
        }

    def encode(self, logits: np.ndarray, *, first_view: int | None = None) -> np.ndarray:
        """float32 [n, C] to the stored type.

        Args:
          logits: of n consecutive views.
          first_view: index of the first of them, for the message.

        Raises:
          DataError: a logit does not fit, or is not finite.
        """
        with np.errstate(over="ignore"):  # caught below, with the number in the message
            encoded = logits.astype(self.dtype)
        if not np.isfinite(encoded).all():
            row, column = np.argwhere(~np.isfinite(encoded))[0]
            where = "" if first_view is None else f"view {first_view + row}: "
            raise DataError(
                f"{where}teacher logit {logits[row, column]:g} does not fit --codec={self.name} (largest {np.finfo(self.dtype).max:g}); "
                "use --codec=float32"
            )
        return encoded

    def decode(self, encoded: np.ndarray) -> np.ndarray:
        """The inverse of `encode`: float32 [n, C]."""
        return encoded.astype(np.float32)

    def round_trip(self, logits: tf.Tensor) -> tf.Tensor:
        """`decode(encode(logits))` in a graph, float32 [B, C]: what online logits pass through (law 8)."""
        return logits if self.name == "float32" else tf.cast(tf.cast(logits, tf.float16), tf.float32)

    def allowed_error(self, logits: np.ndarray) -> np.ndarray:
        """Largest rounding error of each logit, float32 [n, C] to float32 [n, C]: half a unit in the last place."""
        if self.name == "float32":
            return np.zeros_like(logits)
        return np.abs(logits) * np.float32(2.0**-11) + np.float32(2.0**-25)


def log_softmax(logits: np.ndarray, temperature: float) -> np.ndarray:
    """log softmax(logits / temperature) over the last axis, in float64."""
    scaled = logits.astype(np.float64) / temperature
    scaled -= scaled.max(axis=-1, keepdims=True)
    return scaled - np.log(np.exp(scaled).sum(axis=-1, keepdims=True))


def fidelity(logits: np.ndarray, decoded: np.ndarray, temperature: float) -> tuple[float, float]:
    """What a codec costs: summed KL(teacher || decoded) at the temperature, in nats, and worst logit error.

    Args:
      logits: float32 [n, C], the teacher's.
      decoded: float32 [n, C], after the codec.
      temperature: of both softmaxes.
    """
    log_p, log_q = log_softmax(logits, temperature), log_softmax(decoded, temperature)
    kl = np.exp(log_p) * (log_p - log_q)
    return float(kl.sum()), float(np.abs(logits - decoded).max())
