"""Where a batch's images come from: encoded from the data set, or decoded from a cache in memory."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import Protocol

import numpy as np
import tensorflow as tf

from pipeline.dataset import image_sizes
from pipeline.errors import DataError
from pipeline.views.render import Renderer, fingerprint32

_SAMPLE = 64  # images decoded to estimate whether all of them fit
_HEADROOM = 1.05  # of that estimate
_ALIGNMENT = 64  # bytes; TensorFlow slices a buffer without a copy at this alignment


class EncodedImages(Protocol):
    """What is asked of a data set: `pipeline.dataset.Dataset`, or a list of images in a test."""

    num_examples: int

    def read(self, examples: np.ndarray) -> list[bytes]:
        """Encoded images of examples int64 [n]."""


@dataclasses.dataclass(frozen=True)
class LoadedImages:
    """The images of a batch, encoded or decoded, never both.

    Attributes:
      examples: int64 [K].
      encoded: K encoded images, or None.
      decoded: K arrays uint8 [H, W, 3] as `Renderer.prepare` gives them, or None.
      source_hash: int64 [K] fingerprints of the encoded bytes where decoded, else None.
    """

    examples: np.ndarray
    encoded: list[bytes] | None = None
    decoded: list[np.ndarray] | None = None
    source_hash: np.ndarray | None = None

    def sizes(self) -> np.ndarray:
        """(height, width) in pixels of what boxes refer to: int32 [K, 2]."""
        if self.decoded is not None:
            return np.array([image.shape[:2] for image in self.decoded], np.int32)
        distinct, first, inverse = np.unique(self.examples, return_index=True, return_inverse=True)
        try:
            return image_sizes([self.encoded[i] for i in first])[inverse]  # type: ignore[index]
        except DataError as error:
            raise _named(error, distinct, [self.encoded[i] for i in first]) from error  # type: ignore[index]


def _named(error: Exception, examples: np.ndarray, encoded: list[bytes]) -> DataError:
    """The error with the first example that cannot be decoded named."""
    for example, data in zip(examples, encoded, strict=True):
        try:
            image_sizes([data])
            tf.io.decode_image(data, channels=3, expand_animations=False)
        except (DataError, tf.errors.InvalidArgumentError) as cause:
            reason = (getattr(cause, "message", None) or str(cause)).strip().splitlines()[0]
            return DataError(
                f"example {example}: {len(data)} bytes that are not a whole image: {reason}; mend or drop it"
            )
    return DataError(f"a batch of {len(examples)} images cannot be rendered: {str(error).splitlines()[0]}")


class ImageSource:
    """Loads images by example; keeps them decoded if all of them fit into `cache_bytes`.

    Whether they fit is estimated from a sample. Once the limit is reached nothing more is kept, so that
    memory stays bounded whatever the estimate; the result is the same bit for bit either way.
    """

    def __init__(self, images: EncodedImages, renderer: Renderer, *, cache_bytes: int = 0) -> None:
        self.images = images
        self.renderer = renderer
        self.cache_bytes = cache_bytes
        self.estimated_bytes = self._estimate() if cache_bytes else 0
        self.cached = bool(cache_bytes) and self.estimated_bytes <= cache_bytes
        self._prepare: Callable[[tf.Tensor], tf.Tensor] = tf.function(
            renderer.prepare, input_signature=[tf.TensorSpec([], tf.string)]
        )
        self._kept: dict[int, tuple[np.ndarray, int]] = {}
        self._kept_bytes = 0
        self._lock = threading.Lock()

    def _estimate(self) -> int:
        count = min(_SAMPLE, self.images.num_examples)
        examples = np.linspace(0, self.images.num_examples - 1, count).astype(np.int64)
        # One at a time, so that the estimate of a set of huge images stays small itself.
        total = 0
        for example in examples:
            encoded = self.images.read(np.array([example]))
            try:
                total += int(tf.size(self.renderer.prepare(tf.constant(encoded[0]))))
            except tf.errors.InvalidArgumentError as error:
                raise _named(error, examples[examples == example][:1], encoded) from error
        return int(total / count * self.images.num_examples * _HEADROOM)

    def load(self, examples: np.ndarray) -> LoadedImages:
        """The images of examples int64 [K]; repeated ones are read once."""
        distinct, inverse = np.unique(examples, return_inverse=True)
        if not self.cached:
            encoded = self.images.read(distinct)
            return LoadedImages(examples, encoded=[encoded[i] for i in inverse])
        entries = [self._kept.get(int(example)) for example in distinct]
        missing = [slot for slot, entry in enumerate(entries) if entry is None]
        if missing:
            for slot, encoded_image in zip(missing, self.images.read(distinct[missing]), strict=True):
                entries[slot] = self._keep(int(distinct[slot]), encoded_image)
        return LoadedImages(
            examples,
            decoded=[entries[i][0] for i in inverse],  # type: ignore[index]
            source_hash=np.array([entries[i][1] for i in inverse], np.int64),  # type: ignore[index]
        )

    def _keep(self, example: int, encoded: bytes) -> tuple[np.ndarray, int]:
        try:
            image = self._prepare(tf.constant(encoded)).numpy()
        except tf.errors.InvalidArgumentError as error:
            raise _named(error, np.array([example]), [encoded]) from error
        entry = (image, int(fingerprint32(tf.constant([encoded])).numpy()[0]))
        with self._lock:
            if example not in self._kept and self._kept_bytes + image.nbytes <= self.cache_bytes:
                self._kept[example] = entry
                self._kept_bytes += image.nbytes
        return entry

    def explain(self, examples: np.ndarray, error: Exception) -> DataError:
        """A DataError that names the example among int64 [n] at which rendering failed."""
        distinct = np.unique(examples)
        return _named(error, distinct, self.images.read(distinct))


def pack_regions(loaded: LoadedImages, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The boxes of decoded images in one buffer, copied once each.

    Copying the whole image to cut a box from it in TensorFlow was slower than decoding it; this copy holds
    no interpreter lock, and TensorFlow takes the buffer and its aligned slices without another.

    Args:
      loaded: K decoded images.
      boxes: int32 [K, 4], inside the images.

    Returns:
      buffer: uint8 [n].
      starts: int64 [K], where each region begins; it is uint8 [height, width, 3], row-major.
    """
    sizes = boxes[:, 2].astype(np.int64) * boxes[:, 3] * 3
    room = -(-sizes // _ALIGNMENT) * _ALIGNMENT
    ends = np.cumsum(room)
    starts = ends - room
    raw = np.empty(int(ends[-1]) + _ALIGNMENT, np.uint8)
    shift = -raw.ctypes.data % _ALIGNMENT
    buffer = raw[shift : shift + int(ends[-1])]
    for image, start, size, (y, x, height, width) in zip(
        loaded.decoded or [], starts, sizes, boxes, strict=True
    ):
        buffer[start : start + size].reshape(height, width, 3)[...] = image[y : y + height, x : x + width]
    return buffer, starts
