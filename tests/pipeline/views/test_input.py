"""pipeline.views.input: a view is the same whatever batch, path or replay shows it."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import pytest
import tensorflow as tf

from pipeline.errors import DataError
from pipeline.errors.causes import find_error
from pipeline.precomputing.worker import rendered_records
from pipeline.store.codecs import make_codec
from pipeline.store.metadata import SplitManifest
from pipeline.store.openers import DiskOpener
from pipeline.store.reader import SplitReader
from pipeline.store.serialization import serialize
from pipeline.store.shards import ShardInfo, shard_name, write_shard
from pipeline.views.batches import plan_batch
from pipeline.views.input import Batch, ViewInput
from pipeline.views.mix import mix
from pipeline.views.order import example_of_view
from pipeline.views.policies import POLICIES
from pipeline.views.policies.base import ViewPolicy
from pipeline.views.policies.inception import Inception
from pipeline.views.policies.light import Light
from pipeline.views.records import SampledViews, ViewRecords
from pipeline.views.render import BoxRenderer, Window, fingerprint32
from pipeline.views.source import ImageSource
from tests.images import KINDS, TRAIN_IMAGES, ImageList, encode, encoded_images, photo
from tests.stores import ANY_DATASET

SIZE, CLASSES, SEED = 24, 5, 0
POLICY = Inception(image_size=SIZE)
CACHE = 1 << 30


def view_input(
    images: list[bytes], batch_size: int, *, policy: ViewPolicy = POLICY, cache_bytes: int = 0
) -> ViewInput:
    records = SampledViews(policy=policy, seed=SEED, num_examples=len(images), num_classes=CLASSES)
    source = ImageSource(ImageList(images), policy.renderer(), cache_bytes=cache_bytes)
    return ViewInput(records, source, batch_size)


def crops_of(views: ViewInput, starts: np.ndarray) -> np.ndarray:
    """The batches' own crops, in order: uint8 [n, S, S, 3]."""
    return np.concatenate([b["crops"][: views.batch_size].numpy() for b in views.batches(starts)])


def mixed_of(views: ViewInput, starts: np.ndarray) -> np.ndarray:
    """The batches' views: float32 [n, S, S, 3]."""
    return np.concatenate(
        [mix(b["crops"], b["partner"], b["ratio"][: views.batch_size]).numpy() for b in views.batches(starts)]
    )


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    return encoded_images(TRAIN_IMAGES)


@pytest.mark.parametrize("name", ["inception", "light"])
def test_a_view_does_not_depend_on_batch_size_or_position(images: list[bytes], name: str) -> None:
    """Crops and mixed views of three epochs and a bit, cut into batches of 1, 3 and 8, and from view 5 on."""
    policy = POLICIES[name](image_size=SIZE)
    single = view_input(images, 1, policy=policy)
    count = 3 * len(images) + 5
    crops, mixed = crops_of(single, np.arange(count)), mixed_of(single, np.arange(count))
    for batch_size, first in ((3, 0), (8, 0), (8, 5)):
        views = view_input(images, batch_size, policy=policy)
        starts = np.arange(first, count - batch_size + 1, batch_size)
        stop = starts[-1] + batch_size
        np.testing.assert_array_equal(crops_of(views, starts), crops[first:stop])
        np.testing.assert_array_equal(mixed_of(views, starts), mixed[first:stop])
    # The single views are mixed from the crops that the design specifies.
    partner = [v + 1 if (v + 1) % len(images) else v + 1 - len(images) for v in range(count - 1)]
    ratio = np.concatenate([b["ratio"][:1].numpy() for b in single.batches(np.arange(count - 1))])
    r = ratio[:, None, None, None]
    expected = r * crops[:-1].astype(np.float32) + (np.float32(1) - r) * crops[partner].astype(np.float32)
    np.testing.assert_array_equal(mixed[:-1], expected)


def test_epochs_shorter_than_a_batch(images: list[bytes]) -> None:
    few = images[:3]
    np.testing.assert_array_equal(
        mixed_of(view_input(few, 8), np.array([0, 8, 16])), mixed_of(view_input(few, 1), np.arange(24))
    )


def test_cached_and_encoded_input_are_bit_equal(images: list[bytes]) -> None:
    """680 views: 40 random boxes on each image, of every kind of the data set."""
    starts = np.arange(0, 40 * len(images), 34)
    encoded, cached = view_input(images, 34), view_input(images, 34, cache_bytes=CACHE)
    assert cached.source.cached
    for one, other in zip(encoded.batches(starts), cached.batches(starts), strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name].numpy(), other[name].numpy(), err_msg=name)


def test_light_cached_and_encoded_input_are_bit_equal(images: list[bytes]) -> None:
    policy = Light(image_size=SIZE)
    starts = np.arange(0, 68, 34)
    encoded = view_input(images, 34, policy=policy)
    cached = view_input(images, 34, policy=policy, cache_bytes=CACHE)
    np.testing.assert_array_equal(crops_of(encoded, starts), crops_of(cached, starts))


@pytest.mark.parametrize("cache_bytes", [0, CACHE], ids=["encoded", "cached"])
def test_draw_store_read_back_render(tmp_path, cache_bytes: int) -> None:
    """Every kind of image, odd sizes, a pixel high and a pixel wide: the replayed crop is the drawn one."""
    kinds = [(kind, h, w) for kind in KINDS for h, w in ((61, 83), (1, 53), (40, 1))]
    images = [encode(photo(h, w, seed=i), kind) for i, (kind, h, w) in enumerate(kinds)]
    count, batch_size = 4 * len(images), 16
    drawn = view_input(images, batch_size)
    starts = np.arange(0, count, batch_size)
    batches = list(drawn.batches(starts))
    codec = make_codec("float32", CLASSES, temperature=2.0)
    logits = np.random.default_rng(0).normal(size=(len(starts) * batch_size, CLASSES)).astype(np.float32)
    chunks = [
        serialize(rendered_records(batch, part), codec.encode(part))
        for batch, part in zip(batches, np.split(logits, len(starts)), strict=True)
    ]
    total = len(starts) * batch_size
    size, sha256 = write_shard(tmp_path / shard_name("views", 0), chunks, total)
    info = ShardInfo(records=total, bytes=size, sha256=sha256, kl=0.0, max_error=0.0)
    reader = SplitReader(
        "views",
        SplitManifest(dataset=ANY_DATASET, shards=(info,)),
        DiskOpener(tmp_path, "views", [info]),
        codec=codec,
        num_examples=len(images),
    )
    source = ImageSource(ImageList(images), drawn.renderer, cache_bytes=cache_bytes)
    replay = ViewInput(reader, source, batch_size)
    for number, (first, second) in enumerate(zip(batches[:-1], replay.batches(starts[:-1]), strict=True)):
        assert second["stored"].numpy().all()
        for row in range(batch_size + 2):
            kind = kinds[int(first["example"][row])]
            np.testing.assert_array_equal(first["crops"][row], second["crops"][row], err_msg=str(kind))
        for name in ("views", "example", "box", "flip", "ratio", "partner"):
            np.testing.assert_array_equal(first[name].numpy(), second[name].numpy(), err_msg=name)
        expected = logits[number * batch_size : (number + 1) * batch_size]
        np.testing.assert_array_equal(second["logits"].numpy(), expected)


def test_found_hashes_are_of_the_crops_and_the_encoded_images(images: list[bytes]) -> None:
    for cache_bytes in (0, CACHE):
        views = view_input(images, 8, cache_bytes=cache_bytes)
        batch = next(views.batches(np.array([3])))
        flat = tf.reshape(batch["crops"], [10, -1])
        np.testing.assert_array_equal(batch["found_crop_hash"].numpy(), fingerprint32(flat).numpy())
        own = [images[int(example)] for example in batch["example"]]
        np.testing.assert_array_equal(batch["found_source_hash"], fingerprint32(tf.constant(own)))


@dataclasses.dataclass(frozen=True)
class CountingRenderer(BoxRenderer):
    """Counts the images that are decoded."""

    calls: list[int] = dataclasses.field(default_factory=list)

    def cut(self, encoded: tf.Tensor, window: Window, *, jpeg: bool = False) -> tf.Tensor:
        def count() -> np.bool_:
            self.calls.append(1)
            return np.bool_(True)

        with tf.control_dependencies([tf.numpy_function(count, [], tf.bool)]):
            return super().cut(tf.identity(encoded), window, jpeg=jpeg)


@pytest.mark.parametrize("batch_size", [1, 8, 40])
def test_a_batch_of_b_views_decodes_at_most_b_plus_2_images(images: list[bytes], batch_size: int) -> None:
    """Not 2 * B: the partner's crop is, but for two, one of the batch's own."""
    renderer, listed = CountingRenderer(SIZE), ImageList(images)
    records = SampledViews(policy=POLICY, seed=SEED, num_examples=len(images), num_classes=CLASSES)
    views = ViewInput(records, ImageSource(listed, renderer), batch_size)
    assert views.source.encoded_bytes > 0  # of a sample, which is read once
    listed.num_read = 0
    starts = np.arange(6) * batch_size
    batches = list(views.batches(starts))
    assert len(batches) == 6
    assert all(batch["crops"].shape == (batch_size + 2, SIZE, SIZE, 3) for batch in batches)
    assert 6 * batch_size <= len(renderer.calls) <= 6 * (batch_size + 2)
    assert listed.num_read <= 6 * (batch_size + 2)


def test_static_shapes_and_types(images: list[bytes]) -> None:
    views = view_input(images, 4)
    spec = views.dataset(tf.data.Dataset.range(1)).element_spec
    k = 6
    expected = {
        "crops": ((k, SIZE, SIZE, 3), tf.uint8),
        "partner": ((4,), tf.int32),
        "logits": ((4, CLASSES), tf.float32),
        "ratio": ((k,), tf.float32),
        "box": ((k, 4), tf.int32),
        "views": ((k,), tf.int64),
    }
    for name, (shape, dtype) in expected.items():
        assert tuple(spec[name].shape) == shape, name
        assert spec[name].dtype == dtype, name


def test_batches_are_in_the_requested_order(images: list[bytes]) -> None:
    starts = np.array([30, 0, 7, 7, 51])
    firsts = [int(batch["views"][0]) for batch in view_input(images, 4).batches(starts)]
    assert firsts == starts.tolist()


class TamperedViews(SampledViews):
    """Drawn views that pretend to be stored, with the right fingerprints but for one view."""

    wrong_view = 9
    wrong_column = "crop_hash"

    def fetch(self, views: np.ndarray, source: ImageSource) -> tuple[ViewRecords, object]:
        records, loaded = super().fetch(views, source)
        hashes = {}
        for column in ("crop_hash", "source_hash"):
            right = np.array([HASHES[int(view)][column] for view in views], np.int64)
            hashes[column] = right + ((views == self.wrong_view) & (column == self.wrong_column))
        return dataclasses.replace(records, stored=np.ones(len(views), bool), **hashes), loaded


HASHES: dict[int, dict[str, int]] = {}


@pytest.mark.parametrize("column", ["crop_hash", "source_hash"])
@pytest.mark.parametrize("cache_bytes", [0, CACHE], ids=["encoded", "cached"])
def test_a_fingerprint_that_differs_is_refused_with_both_sides(
    images: list[bytes], column: str, cache_bytes: int
) -> None:
    drawn = view_input(images, 4)
    for batch in drawn.batches(np.array([0, 4, 8, 12])):
        for row, view in enumerate(batch["views"].numpy().tolist()):
            HASHES[view] = {c: int(batch[f"found_{c}"][row]) for c in ("crop_hash", "source_hash")}
    tampered = TamperedViews(policy=POLICY, seed=SEED, num_examples=len(images), num_classes=CLASSES)
    object.__setattr__(tampered, "wrong_column", column)
    source = ImageSource(ImageList(images), drawn.renderer, cache_bytes=cache_bytes)
    batches = ViewInput(tampered, source, 4).batches(np.array([0, 4, 8]))
    next(batches)  # views 0..3 and their partner: nothing is wrong there
    with pytest.raises(DataError) as caught:
        list(batches)
    example = int(example_of_view(np.array([9]), num_examples=len(images), seed=SEED)[0])
    right = HASHES[9][column]
    assert f"view 9 (example {example}): {column.split('_', maxsplit=1)[0]} fingerprint" in str(caught.value)
    assert f"{right:08x} here, {right + 1:08x} in the store" in str(caught.value)


def test_an_error_through_tf_data_is_found_by_its_text(images: list[bytes]) -> None:
    """Inside another data set, as in the trainer's `fit`, no call of `batches` explains it."""
    tampered = TamperedViews(policy=POLICY, seed=SEED, num_examples=len(images), num_classes=CLASSES)
    HASHES.update({v: {"crop_hash": 1, "source_hash": 2} for v in range(6)})
    views = ViewInput(tampered, ImageSource(ImageList(images), POLICY.renderer()), 4)
    with pytest.raises(tf.errors.OpError) as caught:
        next(iter(views.dataset(tf.data.Dataset.range(1))))
    found = find_error(caught.value)
    assert isinstance(found, DataError)
    assert str(found).startswith("view 0 (example ")
    assert "in the store" in str(found)


class StoredViews(TamperedViews):
    """Stored views with boxes and fingerprints of large images, whatever images are there now."""

    wrong_view = -1

    def fetch(self, views: np.ndarray, source: ImageSource) -> tuple[ViewRecords, object]:
        records, loaded = super().fetch(views, source)
        return dataclasses.replace(records, box=np.tile(np.int32([50, 60, 9, 9]), (len(views), 1))), loaded


@pytest.mark.parametrize("cache_bytes", [0, CACHE], ids=["encoded", "cached"])
def test_boxes_outside_another_data_sets_images_are_refused_by_fingerprint(cache_bytes: int) -> None:
    """Not by an error of the slice: what is wrong is the data set."""
    small = [encode(photo(20, 30, seed=i), "jpeg_420") for i in range(5)]
    stored = StoredViews(policy=POLICY, seed=SEED, num_examples=5, num_classes=CLASSES)
    HASHES.update({v: {"crop_hash": 1, "source_hash": 2} for v in range(6)})
    views = ViewInput(stored, ImageSource(ImageList(small), POLICY.renderer(), cache_bytes=cache_bytes), 4)
    with pytest.raises(
        DataError, match=r"view 0 \(example \d\): source fingerprint is \w{8} here, 00000002 in"
    ):
        next(views.batches(np.array([0])))
    if cache_bytes:  # also inside another data set, where nothing can explain it afterwards
        with pytest.raises(tf.errors.OpError) as caught:
            next(iter(views.dataset(tf.data.Dataset.range(1))))
        assert "source fingerprint is" in str(find_error(caught.value))


class CountedViews(SampledViews):
    """Counts the batches that are fetched."""

    fetched = 0

    def fetch(self, views: np.ndarray, source: ImageSource) -> tuple[ViewRecords, object]:
        CountedViews.fetched += 1
        return super().fetch(views, source)


def fetched_ahead(images: list[bytes], buffer_bytes: int | None, *, threads: int = 40) -> int:
    """How many batches of 5 crops are fetched while the consumer has taken one."""
    records = CountedViews(policy=POLICY, seed=SEED, num_examples=len(images), num_classes=CLASSES)
    source = ImageSource(ImageList(images), POLICY.renderer())
    views = ViewInput(records, source, 3, buffer_bytes=buffer_bytes)
    CountedViews.fetched = 0
    batches = views.batches(np.arange(0, 3000, 3), threads=threads)
    next(batches)
    before = -1
    while before != CountedViews.fetched:  # until all buffers are full
        before = CountedViews.fetched
        time.sleep(0.5)
    del batches
    return before


def test_buffers_are_bounded_by_bytes(images: list[bytes]) -> None:
    crops = 5 * SIZE**2 * 3
    encoded = 5 * sum(map(len, images)) // len(images)
    bounded = fetched_ahead(images, 10 * (crops + encoded))
    assert 5 <= bounded <= 20
    assert fetched_ahead(images, 0) <= 8  # one at a time, and those that are done
    assert fetched_ahead(images, None) >= 40


def test_batches_are_the_same_under_any_bound(images: list[bytes]) -> None:
    starts = np.arange(0, 20, 4)
    expected = crops_of(view_input(images, 4), starts)
    bounded = dataclasses.replace(view_input(images, 4), buffer_bytes=0)
    np.testing.assert_array_equal(crops_of(bounded, starts), expected)


@pytest.mark.parametrize("cache_bytes", [0, CACHE], ids=["encoded", "cached"])
def test_a_broken_image_is_named(images: list[bytes], cache_bytes: int) -> None:
    broken = list(images)
    views = view_input(broken, 4, cache_bytes=cache_bytes)
    broken[10] = broken[10][: len(broken[10]) // 2]  # a JPEG that ends in the middle
    with pytest.raises(DataError, match=r"example 10: \d+ bytes"):
        crops_of(views, np.arange(0, 17, 4))


def test_the_plan_may_be_another(images: list[bytes]) -> None:
    backwards = dataclasses.replace(
        view_input(images, 4), plan=lambda start: plan_batch(100 - start, 4, num_examples=len(images))
    )
    batch: Batch = next(backwards.batches(np.array([40])))
    assert batch["views"][:4].numpy().tolist() == [60, 61, 62, 63]
