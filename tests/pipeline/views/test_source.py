"""pipeline.views.source: encoded or decoded images, bit-identical, in bounded memory."""

from __future__ import annotations

import concurrent.futures

import numpy as np
import pytest
import tensorflow as tf

from pipeline.errors import DataError
from pipeline.views.policies import POLICIES
from pipeline.views.policies.inception import Inception
from pipeline.views.render import fingerprint32
from pipeline.views.source import ImageSource, LoadedImages
from tests.images import TRAIN_IMAGES, ImageList, encoded_images

RENDERER = Inception(image_size=24).renderer()
SIZES = np.array([size for _, *size in TRAIN_IMAGES])
BYTES = int(SIZES.prod(axis=1).sum()) * 3


def decoded(loaded: LoadedImages) -> list[np.ndarray]:
    """The images of a batch, sliced from the bank as in TensorFlow."""
    return [
        loaded.bank[start : start + length].reshape(shape) for start, length, *shape in loaded.places.tolist()
    ]


@pytest.fixture
def images() -> ImageList:
    return ImageList(encoded_images(TRAIN_IMAGES))


def test_encoded_images_are_read_once_per_batch(images: ImageList) -> None:
    loaded = ImageSource(images, RENDERER).load(np.array([3, 3, 0, 3]))
    assert images.num_read == 2
    assert loaded.encoded == [images.images[i] for i in (3, 3, 0, 3)]
    assert loaded.bank is None


def test_cache_decodes_each_image_once(images: ImageList) -> None:
    source = ImageSource(images, RENDERER, cache_bytes=1 << 30)
    assert source.cached
    images.num_read = 0  # those whose headers were read
    for _ in range(3):
        loaded = source.load(np.array([5, 1, 5]))
    assert images.num_read == 2
    assert loaded.encoded is None
    for image, example in zip(decoded(loaded), (5, 1, 5), strict=True):
        expected = RENDERER.prepare(tf.constant(images.images[example]))
        np.testing.assert_array_equal(image, expected.numpy())
    found = fingerprint32(tf.constant([images.images[i] for i in (5, 1, 5)])).numpy()
    np.testing.assert_array_equal(loaded.source_hash, found)


def test_sizes_agree_with_and_without_cache(images: ImageList) -> None:
    examples = np.array([7, 0, 8, 9, 14, 7])
    for cache_bytes in (0, 1 << 30):
        sizes = ImageSource(images, RENDERER, cache_bytes=cache_bytes).load(examples).sizes()
        np.testing.assert_array_equal(sizes, SIZES[examples])


def test_a_cache_holds_all_images_or_none(images: ImageList) -> None:
    places = -(-SIZES.prod(axis=1) * 3 // 64) * 64
    assert ImageSource(images, RENDERER, cache_bytes=int(places.sum())).cached
    assert not ImageSource(images, RENDERER, cache_bytes=int(places.sum()) - 1).cached


def test_a_data_set_that_is_far_too_large_is_not_read_completely(images: ImageList) -> None:
    many = ImageList(images.images * 40)
    assert not ImageSource(many, RENDERER, cache_bytes=BYTES).cached
    assert many.num_read < many.num_examples


@pytest.mark.parametrize("name", ["inception", "light"])
def test_room_is_what_the_decoded_images_need(images: ImageList, name: str) -> None:
    renderer = POLICIES[name](image_size=24).renderer()
    source = ImageSource(images, renderer, cache_bytes=1 << 30)
    loaded = source.load(np.arange(len(TRAIN_IMAGES)))
    ends = loaded.places[:, 0] + loaded.places[:, 1]
    assert len(loaded.bank) - 64 < ends.max() <= len(loaded.bank) < BYTES * 2


def test_images_in_the_bank_are_aligned_and_never_move(images: ImageList) -> None:
    source = ImageSource(images, RENDERER, cache_bytes=1 << 30)
    before = source.load(np.array([0, 7, 3]))
    source.load(np.arange(len(TRAIN_IMAGES)))
    after = source.load(np.array([0, 7, 3]))
    assert after.bank.ctypes.data == before.bank.ctypes.data
    assert after.bank.ctypes.data % 64 == 0
    assert (after.places[:, 0] % 64 == 0).all()
    np.testing.assert_array_equal(after.places, before.places)


def test_threads_that_load_at_once_agree(images: ImageList) -> None:
    source = ImageSource(images, RENDERER, cache_bytes=1 << 30)
    everything = np.arange(len(TRAIN_IMAGES))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        loads = list(pool.map(source.load, [np.roll(everything, shift) for shift in range(8)]))
    for loaded in loads:
        for image, example in zip(decoded(loaded), loaded.examples, strict=True):
            expected = RENDERER.prepare(tf.constant(images.images[example]))
            np.testing.assert_array_equal(image, expected.numpy())


def test_an_image_that_is_larger_than_its_header_said_is_refused(images: ImageList) -> None:
    source = ImageSource(images, RENDERER, cache_bytes=1 << 30)
    largest = int(SIZES.prod(axis=1).argmax())
    source.load(np.arange(len(TRAIN_IMAGES) - 1))
    images.images[-1] = encoded_images([("png_rgb", 500, 500)])[0]
    assert largest != len(TRAIN_IMAGES) - 1
    with pytest.raises(DataError, match=r"example \d+: .*500 x 500"):
        source.load(np.array([len(TRAIN_IMAGES) - 1]))


@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
def test_a_broken_image_is_named(images: ImageList, damage: str, cache_bytes: int) -> None:
    source = ImageSource(images, RENDERER, cache_bytes=cache_bytes)
    whole = images.images[10]
    images.images[10] = {"truncated": whole[: len(whole) // 2], "text": b"not an image", "empty": b""}[damage]
    with pytest.raises(DataError, match=r"example 10: \d+ bytes"):
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
