"""Where a batch's images come from: encoded from the data set, or decoded from a cache in memory."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable
from typing import Protocol

import numpy as np
import tensorflow as tf

from pipeline.errors import DataError
from pipeline.errors.causes import first_line
from pipeline.views.headers import image_sizes
from pipeline.views.render import Renderer, fingerprint32

_SAMPLE = 64  # images whose headers are read to estimate whether all of them fit
_SAMPLE_ENCODED = 16  # images that are read to estimate what a batch of encoded ones takes
_READ = 256  # images at a time where the headers of all are read
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
      bank: uint8 [n] that holds the decoded images, or None; see `ImageBank`.
      places: int64 [K, 5], where each begins in the bank, its bytes, height, width and channels; row-major.
      source_hash: int64 [K] fingerprints of the encoded bytes where decoded, else None.
    """

    examples: np.ndarray
    encoded: list[bytes] | None = None
    bank: np.ndarray | None = None
    places: np.ndarray | None = None
    source_hash: np.ndarray | None = None

    def sizes(self) -> np.ndarray:
        """(height, width) in pixels of what boxes refer to: int32 [K, 2]."""
        if self.places is not None:
            return self.places[:, 2:4].astype(np.int32)
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
    return DataError(f"a batch of {len(examples)} images cannot be rendered: {first_line(error)}")


class ImageBank:
    """Decoded images in one buffer of a fixed size, each at an aligned place that never changes.

    One buffer, because TensorFlow takes an aligned array, and an aligned slice of it, without a copy; an image then
    costs the copy of its box. A copy of the whole image first was slower than decoding, and one of the box into a
    buffer of the batch's own spent half of its time in fresh pages.

    Args:
      capacity: bytes; pages that nothing is written to take no memory.
      num_examples: N.
    """

    def __init__(self, capacity: int, num_examples: int) -> None:
        raw = np.empty(capacity + _ALIGNMENT, np.uint8)
        shift = -raw.ctypes.data % _ALIGNMENT
        self.buffer = raw[shift : shift + capacity]
        self.places = np.zeros((num_examples, 5), np.int64)  # start, bytes, height, width, channels
        self.source_hash = np.zeros(num_examples, np.int64)
        self.used = 0
        self._lock = threading.Lock()

    def put(self, example: int, image: np.ndarray, source_hash: int) -> bool:
        """Keeps uint8 [H, W, 3]; False if there is no room left."""
        with self._lock:
            if self.places[example, 1]:
                return True
            start, end = self.used, self.used + image.size
            if end > len(self.buffer):
                return False
            self.used = -(-end // _ALIGNMENT) * _ALIGNMENT
            self.buffer[start:end] = image.reshape(-1)
            self.source_hash[example] = source_hash
            self.places[example] = (start, image.size, *image.shape)
            return True

    def lacks(self, examples: np.ndarray) -> np.ndarray:
        """Which of examples int64 [n] are not there yet: bool [n]."""
        return self.places[examples, 1] == 0


class ImageSource:
    """Loads images by example; keeps them decoded if all of them fit into `cache_bytes`.

    Whether they may fit is estimated from a sample, and then known from the headers of all.
    The result is the same bit for bit either way.
    """

    def __init__(self, images: EncodedImages, renderer: Renderer, *, cache_bytes: int = 0) -> None:
        self.images = images
        self.renderer = renderer
        self._prepare: Callable[[tf.Tensor], tf.Tensor] = tf.function(
            renderer.prepare, input_signature=[tf.TensorSpec([], tf.string)]
        )
        self._bank: ImageBank | None = None
        if cache_bytes and self._estimate() <= cache_bytes and (needed := self._measure()) <= cache_bytes:
            self._bank = ImageBank(needed, images.num_examples)

    @functools.cached_property
    def encoded_bytes(self) -> int:
        """Bytes of an encoded image, the mean of a sample."""
        examples = np.linspace(
            0, self.images.num_examples - 1, min(_SAMPLE_ENCODED, self.images.num_examples)
        )
        found = self.images.read(np.unique(examples.astype(np.int64)))
        return sum(map(len, found)) // len(found)

    @property
    def cached(self) -> bool:
        """Whether images are kept decoded."""
        return self._bank is not None

    def _estimate(self) -> int:
        """Bytes of all decoded images, from a sample that is read one at a time."""
        count = min(_SAMPLE, self.images.num_examples)
        examples = np.linspace(0, self.images.num_examples - 1, count).astype(np.int64)
        return int(
            sum(self._bytes(examples[i : i + 1]) for i in range(count)) / count * self.images.num_examples
        )

    def _measure(self) -> int:
        """Bytes of all decoded images and what aligns them."""
        examples = np.arange(self.images.num_examples)
        return sum(self._bytes(examples[i : i + _READ]) for i in range(0, len(examples), _READ))

    def _bytes(self, examples: np.ndarray) -> int:
        encoded = self.images.read(examples)
        try:
            shapes = self.renderer.prepared_shapes(image_sizes(encoded))
        except DataError as error:
            raise _named(error, examples, encoded) from error
        sizes = shapes.astype(np.int64).prod(axis=1) * 3
        return int((-(-sizes // _ALIGNMENT) * _ALIGNMENT).sum())

    def load(self, examples: np.ndarray) -> LoadedImages:
        """The images of examples int64 [K]; repeated ones are read once."""
        bank = self._bank
        if bank is None:
            distinct, inverse = np.unique(examples, return_inverse=True)
            encoded = self.images.read(distinct)
            return LoadedImages(examples, encoded=[encoded[i] for i in inverse])
        missing = np.unique(examples[bank.lacks(examples)])
        if len(missing):
            for example, image in zip(missing.tolist(), self.images.read(missing), strict=True):
                self._keep(bank, example, image)
        return LoadedImages(
            examples,
            bank=bank.buffer,
            places=bank.places[examples],
            source_hash=bank.source_hash[examples],
        )

    def _keep(self, bank: ImageBank, example: int, encoded: bytes) -> None:
        try:
            image = self._prepare(tf.constant(encoded)).numpy()
        except tf.errors.InvalidArgumentError as error:
            raise _named(error, np.array([example]), [encoded]) from error
        if not bank.put(example, image, int(fingerprint32(tf.constant([encoded])).numpy()[0])):
            raise DataError(
                f"example {example}: decodes to {image.shape[0]} x {image.shape[1]} pixels, which is not what the images' "
                "headers say; mend or drop it, or pass --image_cache_bytes=0"
            )

    def explain(self, examples: np.ndarray, error: Exception) -> DataError:
        """A DataError that names the example among int64 [n] at which rendering failed."""
        distinct = np.unique(examples)
        return _named(error, distinct, self.images.read(distinct))
