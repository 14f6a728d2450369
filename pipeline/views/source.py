"""The images of a batch: encoded, from the data set, or decoded, from a cache in memory."""

from __future__ import annotations

import copy
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

_SAMPLE = 64  # images whose headers are read to estimate the decoded size of all
_SAMPLE_ENCODED = 16  # images that are read to estimate the mean encoded size
_READ = 256  # images per read when all headers are read
_ALIGNMENT = 64  # bytes; at this alignment, TensorFlow slices a buffer without a copy


class EncodedImages(Protocol):
    """Random access to encoded images, such as `pipeline.inputs.dataset.Dataset`."""

    num_examples: int

    def read(self, examples: np.ndarray) -> list[bytes]:
        """Encoded images of examples int64 [n]."""


@dataclasses.dataclass(frozen=True)
class LoadedImages:
    """The images of a batch, either encoded or decoded.

    Attributes:
      examples: int64 [K].
      encoded: K encoded images, or None.
      bank: uint8 [n] buffer with the decoded images, or None; see `ImageBank`.
      places: int64 [K, 5]: offset in the bank, size in bytes, height, width and channels of each image; or None.
      source_hash: int64 [K] fingerprints of the encoded images if they are decoded, or None.
    """

    examples: np.ndarray
    encoded: list[bytes] | None = None
    bank: np.ndarray | None = None
    places: np.ndarray | None = None
    source_hash: np.ndarray | None = None

    def sizes(self) -> np.ndarray:
        """Height and width in pixels of the images that boxes refer to: int32 [K, 2]."""
        if self.places is not None:
            return self.places[:, 2:4].astype(np.int32)
        distinct, first, inverse = np.unique(self.examples, return_index=True, return_inverse=True)
        try:
            return image_sizes([self.encoded[i] for i in first])[inverse]  # type: ignore[index]
        except DataError as error:
            raise _named(error, distinct, [self.encoded[i] for i in first]) from error  # type: ignore[index]


def _named(error: Exception, examples: np.ndarray, encoded: list[bytes]) -> DataError:
    """The error that names the first example which cannot be decoded."""
    for example, data in zip(examples, encoded, strict=True):
        try:
            image_sizes([data])
            tf.io.decode_image(data, channels=3, expand_animations=False)
        except (DataError, tf.errors.InvalidArgumentError) as cause:
            reason = (getattr(cause, "message", None) or str(cause)).strip().splitlines()[0]
            return DataError(
                f"example {example}: {len(data)} bytes are not a complete image: {reason}; repair or remove it"
            )
    return DataError(f"a batch of {len(examples)} images cannot be rendered: {first_line(error)}")


class ImageBank:
    """Decoded images in one buffer of a fixed size, each at an aligned offset that never changes.

    TensorFlow uses an aligned array, and an aligned slice of it, without a copy. So only the box of an image is copied. Copying
    whole images first was slower than decoding, and copying boxes to a buffer per batch spent half of the time on page faults.

    Args:
      capacity: size of the buffer in bytes. Unused pages take no memory.
      num_examples: N.
    """

    def __init__(self, capacity: int, num_examples: int) -> None:
        raw = np.empty(capacity + _ALIGNMENT, np.uint8)
        shift = -raw.ctypes.data % _ALIGNMENT
        self.buffer = raw[shift : shift + capacity]
        # The same memory; a conversion would copy it.
        self.tensor: tf.Tensor = tf.experimental.dlpack.from_dlpack(self.buffer.__dlpack__())
        self.places = np.zeros((num_examples, 5), np.int64)  # offset, bytes, height, width, channels
        self.source_hash = np.zeros(num_examples, np.int64)
        self.used = 0
        self._lock = threading.Lock()

    def put(self, example: int, image: np.ndarray, source_hash: int) -> bool:
        """Adds an image, uint8 [H, W, 3]; returns False if there is no space left."""
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
        """Which of the examples int64 [n] are missing: bool [n]."""
        return self.places[examples, 1] == 0


class ImageSource:
    """Loads images by example, and keeps them decoded if all of them fit into `cache_bytes`.

    A sample is used to estimate whether they fit; if so, the headers of all are read to make sure. Crops are bit-identical with and
    without the cache.

    Args:
      renderer: prepares images for the cache.
      cache_bytes: maximum size of the decoded images; 0 disables the cache.
    """

    def __init__(self, images: EncodedImages, renderer: Renderer, *, cache_bytes: int = 0) -> None:
        self.images = images
        self.renderer = renderer
        self._prepare: Callable[[tf.Tensor], tf.Tensor] = tf.function(
            renderer.prepare, input_signature=[tf.TensorSpec([], tf.string)], autograph=False
        )
        self._bank: ImageBank | None = None
        if cache_bytes and self._estimate() <= cache_bytes and (needed := self._measure()) <= cache_bytes:
            self._bank = ImageBank(needed, images.num_examples)

    def rendered_by(self, renderer: Renderer) -> ImageSource:
        """The same images and cache for another renderer, which must prepare images in the same way if they are cached."""
        other = copy.copy(self)
        other.renderer = renderer
        return other

    @functools.cached_property
    def encoded_bytes(self) -> int:
        """Mean size of an encoded image in bytes, from a sample."""
        examples = np.linspace(
            0, self.images.num_examples - 1, min(_SAMPLE_ENCODED, self.images.num_examples)
        )
        found = self.images.read(np.unique(examples.astype(np.int64)))
        return sum(map(len, found)) // len(found)

    @property
    def cached(self) -> bool:
        """Whether decoded images are cached."""
        return self._bank is not None

    @property
    def bank(self) -> tf.Tensor | None:
        """The memory of `LoadedImages.bank` as a tensor, uint8 [bytes]; None without a cache."""
        return None if self._bank is None else self._bank.tensor

    def _estimate(self) -> int:
        """Estimated size of all decoded images in bytes, from a sample that is read image by image."""
        count = min(_SAMPLE, self.images.num_examples)
        examples = np.linspace(0, self.images.num_examples - 1, count).astype(np.int64)
        return int(
            sum(self._bytes(examples[i : i + 1]) for i in range(count)) / count * self.images.num_examples
        )

    def _measure(self) -> int:
        """Size of all decoded images in bytes, including alignment."""
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
        """Loads the images of examples int64 [K]; duplicates are read once."""
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
                f"example {example}: decodes to {image.shape[0]} x {image.shape[1]} pixels, which differs from its header; repair or "
                "remove it, or pass `image_cache_bytes`=0"
            )

    def explain(self, examples: np.ndarray, error: Exception) -> DataError:
        """The error that names the example, among int64 [n], at which rendering failed."""
        distinct = np.unique(examples)
        return _named(error, distinct, self.images.read(distinct))
