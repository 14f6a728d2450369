"""pipeline.views.source: encoded or decoded images, the same bit for bit, in bounded memory."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from pipeline.errors import DataError
from pipeline.views.policies import ViewPolicy
from pipeline.views.render import fingerprint32, training_renderer
from pipeline.views.source import ImageSource, pack_regions
from tests.images import TRAIN_IMAGES, ImageList, encoded_images

RENDERER = training_renderer(ViewPolicy(image_size=24))
SIZES = np.array([size for _, *size in TRAIN_IMAGES])
BYTES = int(SIZES.prod(axis=1).sum()) * 3


@pytest.fixture
def images() -> ImageList:
    return ImageList(encoded_images(TRAIN_IMAGES))


def test_encoded_images_are_read_once_a_batch(images: ImageList) -> None:
    loaded = ImageSource(images, RENDERER).load(np.array([3, 3, 0, 3]))
    assert images.num_read == 2
    assert loaded.encoded == [images.images[i] for i in (3, 3, 0, 3)]
    assert loaded.decoded is None


def test_cache_decodes_each_image_once(images: ImageList) -> None:
    source = ImageSource(images, RENDERER, cache_bytes=1 << 30)
    assert source.cached
    images.num_read = 0  # the estimate's
    for _ in range(3):
        loaded = source.load(np.array([5, 1, 5]))
    assert images.num_read == 2
    assert loaded.encoded is None
    for image, example in zip(loaded.decoded, (5, 1, 5), strict=True):
        expected = RENDERER.prepare(tf.constant(images.images[example]))
        np.testing.assert_array_equal(image, expected.numpy())
    found = fingerprint32(tf.constant([images.images[i] for i in (5, 1, 5)])).numpy()
    np.testing.assert_array_equal(loaded.source_hash, found)


def test_sizes_agree_with_and_without_cache(images: ImageList) -> None:
    examples = np.array([7, 0, 8, 9, 14, 7])
    for cache_bytes in (0, 1 << 30):
        sizes = ImageSource(images, RENDERER, cache_bytes=cache_bytes).load(examples).sizes()
        np.testing.assert_array_equal(sizes, SIZES[examples])


def test_a_cache_that_is_too_small_is_not_used(images: ImageList) -> None:
    source = ImageSource(images, RENDERER, cache_bytes=BYTES // 2)
    assert not source.cached
    assert source.estimated_bytes >= BYTES


def test_memory_stays_bounded_when_the_estimate_was_wrong(images: ImageList) -> None:
    source = ImageSource(images, RENDERER, cache_bytes=2 * BYTES)
    source.cache_bytes = BYTES // 3
    everything = np.arange(len(TRAIN_IMAGES))
    first, second = source.load(everything), source.load(everything)
    assert 0 < source._kept_bytes <= BYTES // 3
    assert source._kept_bytes == sum(image.nbytes for image, _ in source._kept.values())
    for one, other in zip(first.decoded, second.decoded, strict=True):
        np.testing.assert_array_equal(one, other)


def test_regions_are_aligned_slices_of_their_images(images: ImageList) -> None:
    loaded = ImageSource(images, RENDERER, cache_bytes=1 << 30).load(np.array([0, 7, 3]))
    boxes = np.array([[5, 9, 40, 31], [0, 2, 1, 50], [48, 0, 1, 1]], np.int32)
    buffer, starts = pack_regions(loaded, boxes)
    assert (starts % 64 == 0).all()
    assert buffer.ctypes.data % 64 == 0
    for image, start, (y, x, h, w) in zip(loaded.decoded, starts, boxes, strict=True):
        region = buffer[start : start + h * w * 3].reshape(h, w, 3)
        np.testing.assert_array_equal(region, image[y : y + h, x : x + w])


@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
def test_a_broken_image_is_named(images: ImageList, damage: str, cache_bytes: int) -> None:
    source = ImageSource(images, RENDERER, cache_bytes=cache_bytes)
    whole = images.images[10]
    images.images[10] = {"truncated": whole[: len(whole) // 2], "text": b"not an image", "empty": b""}[damage]
    with pytest.raises(DataError, match=r"example 10: \d+ bytes that are not a whole image"):
        raise_for(source, np.array([2, 10]))


def raise_for(source: ImageSource, examples: np.ndarray) -> None:
    loaded = source.load(examples)
    loaded.sizes()
    try:
        for image in loaded.encoded or []:
            source.renderer.prepare(tf.constant(image))
    except tf.errors.InvalidArgumentError as error:
        raise source.explain(examples, error) from error


def test_a_broken_image_is_named_by_the_estimate(images: ImageList) -> None:
    images.images[4] = images.images[4][:200]
    with pytest.raises(DataError, match="example 4: 200 bytes"):
        ImageSource(images, RENDERER, cache_bytes=1 << 30)
