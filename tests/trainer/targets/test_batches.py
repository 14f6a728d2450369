"""trainer.targets.batches: step `t` has the views `[t * B, (t + 1) * B)`, all of them verified."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from pipeline.errors import DataError
from pipeline.errors.causes import find_error
from pipeline.inputs.dataset import Dataset
from pipeline.store.metadata import SplitManifest, publish_metadata
from pipeline.store.reader import SplitReader, StoreReader
from pipeline.store.serialization import serialize
from pipeline.store.shards import ShardInfo, shard_name, write_shard
from pipeline.store.spec import SPEC_FILE
from pipeline.views.batches import partner_views
from pipeline.views.render import fingerprint32
from tests import stores
from tests.runs import Batch, assert_same_batches, forge_records, numpy_batches
from tests.trainer.conftest import MakeStore
from trainer.targets.batches import Targets

VIEWS = 3 * stores.N
CACHE = 1 << 30


def replay(store: Path, data_dir: Path, *, batch_size: int, cache: int = 0, **arguments: Any) -> Targets:
    dataset = Dataset(stores.DATASET, "train", data_dir=data_dir)
    return Targets(StoreReader(store), dataset, batch_size=batch_size, image_cache_bytes=cache, **arguments)


@pytest.fixture(scope="module")
def single_views(three_epochs: Path, data_dir: Path) -> list[Batch]:
    """Every view of the store in a batch of its own; a view does not depend on its batch."""
    return numpy_batches(replay(three_epochs, data_dir, batch_size=1), 0, VIEWS)


@pytest.mark.parametrize("cache", [0, CACHE], ids=["encoded", "cached"])
@pytest.mark.parametrize(
    "batch_size", [4, 17, 20, 51], ids=["crosses_epochs", "whole_epochs", "more_than_an_epoch", "whole_store"]
)
def test_batches_are_the_views_of_their_step(
    three_epochs: Path, data_dir: Path, single_views: list[Batch], batch_size: int, cache: int
):
    batches = numpy_batches(
        replay(three_epochs, data_dir, batch_size=batch_size, cache=cache), 0, VIEWS // batch_size
    )
    assert len(batches) == VIEWS // batch_size
    for step, batch in enumerate(batches):
        for row in range(batch_size):
            view = step * batch_size + row
            partner = int(partner_views(np.array(view), num_examples=stores.N))
            assert batch["views"][row] == view
            # crops: [B + 2, S, S, 3]; the first B are the batch's own.
            np.testing.assert_array_equal(batch["crops"][row], single_views[view]["crops"][0])
            np.testing.assert_array_equal(
                batch["crops"][batch["partner"][row]], single_views[partner]["crops"][0]
            )
            assert batch["ratio"][row] == single_views[view]["ratio"][0]
            np.testing.assert_array_equal(batch["logits"][row], single_views[view]["logits"][0])


def test_resumed_run_has_the_same_batches_from_every_step(three_epochs: Path, data_dir: Path):
    steps = VIEWS // 5
    whole = numpy_batches(replay(three_epochs, data_dir, batch_size=5), 0, steps)
    fresh = replay(three_epochs, data_dir, batch_size=5)
    for step in range(steps):
        assert_same_batches(numpy_batches(fresh, step, steps), whole[step:])


def shapes_and_types(batch: Batch) -> dict[str, tuple[tuple[int, ...], str]]:
    return {name: (value.shape, value.dtype.name) for name, value in batch.items()}


def test_shapes_are_static_and_only_online_batches_have_stored_and_record(three_epochs: Path, data_dir: Path):
    size = stores.SIZE
    expected = {
        "views": ((5,), "int64"),
        "crops": ((7, size, size, 3), "uint8"),
        "partner": ((5,), "int32"),
        "ratio": ((5,), "float32"),
        "logits": ((5, stores.CLASSES), "float32"),
    }
    (batch,) = numpy_batches(replay(three_epochs, data_dir, batch_size=5), 3, 4)
    assert shapes_and_types(batch) == expected
    targets = replay(three_epochs, data_dir, batch_size=5, continued_from=18, with_record=True)
    assert targets.online_from == 3
    (batch,) = numpy_batches(targets, 2, 3)
    assert shapes_and_types(batch) == expected
    (batch,) = numpy_batches(targets, 3, 4)  # views 15..19
    record = batch.pop("record")
    assert shapes_and_types(batch) == {**expected, "stored": ((5,), "bool")}
    assert batch["stored"].tolist() == [True, True, True, False, False]
    records = StoreReader(three_epochs).views.read(np.arange(15, 20))
    assert set(record) == {"example", "box", "flip", "crop_hash", "source_hash"}
    for name, column in record.items():
        np.testing.assert_array_equal(column, getattr(records, name), err_msg=name)


def test_logits_and_ratios_are_the_store_s(three_epochs: Path, data_dir: Path):
    records = StoreReader(three_epochs).views.read(np.arange(VIEWS))
    batches = numpy_batches(replay(three_epochs, data_dir, batch_size=VIEWS), 0, 1)
    np.testing.assert_array_equal(batches[0]["logits"], records.logits)
    np.testing.assert_array_equal(batches[0]["ratio"], records.ratio)


def test_stored_parameters_are_authoritative(store: Path, data_dir: Path, single_views: list[Batch]):
    # No draw yields these values: a replay that drew again would return the old ones.
    mirrored = np.ascontiguousarray(single_views[7]["crops"][0][:, ::-1])
    record = StoreReader(store).views.read(np.array([7]))
    forge_records(store, 7, ratio=0.125)
    (batch,) = numpy_batches(replay(store, data_dir, batch_size=1), 7, 8)
    assert batch["ratio"].tolist() == [0.125]
    forge_records(store, 7, flip=not record.flip[0])
    with pytest.raises(tf.errors.OpError) as caught:
        numpy_batches(replay(store, data_dir, batch_size=1), 7, 8)
    found = find_error(caught.value)
    assert isinstance(found, DataError)
    assert "view 7 " in str(found)
    forge_records(store, 7, crop_hash=int(fingerprint32(mirrored.reshape(1, -1)).numpy()[0]))
    (batch,) = numpy_batches(replay(store, data_dir, batch_size=1), 7, 8)
    np.testing.assert_array_equal(batch["crops"][0], mirrored)


@pytest.mark.parametrize("cache", [0, CACHE], ids=["encoded", "cached"])
def test_other_pixels_under_the_same_metadata_are_refused_with_both_fingerprints(
    three_epochs: Path, forged_data_dir: Path, cache: int
):
    records = StoreReader(three_epochs).views.read(np.arange(20, 27))
    with pytest.raises(DataError) as error:
        list(
            replay(three_epochs, forged_data_dir, batch_size=5, cache=cache).input.batches(np.array([20])),
        )
    found = fingerprint32(
        tf.constant(Dataset(stores.DATASET, "train", data_dir=forged_data_dir).read(records.example[:1]))
    )
    for text in (
        "view 20 ",
        f"example {records.example[0]}",
        "source",
        f"{records.source_hash[0]:08x}",
        f"{int(found[0]):08x}",
    ):
        assert text in str(error.value)
    assert "`data_dir`" in str(error.value)


@pytest.mark.parametrize("cache", [0, CACHE], ids=["encoded", "cached"])
def test_another_crop_than_the_teacher_s_is_refused_with_both_fingerprints(
    store: Path, data_dir: Path, cache: int
):
    before = StoreReader(store).views.read(np.array([22]))
    forge_records(store, 22, crop_hash=0xDEADBEEF)
    with pytest.raises(DataError) as error:
        list(replay(store, data_dir, batch_size=4, cache=cache).input.batches(np.array([16, 20, 24])))
    for text in (
        "view 22 ",
        f"example {before.example[0]}",
        "crop",
        f"{before.crop_hash[0]:08x}",
        "deadbeef",
    ):
        assert text in str(error.value)


def test_partner_s_crop_is_verified_too(store: Path, data_dir: Path):
    forge_records(store, 24, crop_hash=0xDEADBEEF)  # outside the batch 20..23, mixed into 23
    with pytest.raises(DataError, match=r"view 24 .*deadbeef"):
        list(replay(store, data_dir, batch_size=4).input.batches(np.array([20])))


def open_files(directory: Path) -> set[str]:
    """Files of a directory that this process has open."""
    links = set()
    for link in Path("/proc/self/fd").iterdir():
        try:
            links.add(str(link.readlink()))
        except FileNotFoundError:  # the descriptor of the listing itself
            continue
    return {link for link in links if link.startswith(str(directory.resolve()))}


def write_single_record_shards(source: StoreReader, path: Path) -> None:
    """Writes the same store with one shard per view."""
    (path / "eval").mkdir(parents=True)
    shutil.copy(source.path / SPEC_FILE, path)
    codec = source.spec.make_codec()
    records = source.views.read(np.arange(source.views.num_records))
    shards = []
    for view, record in enumerate(serialize(records, codec.encode(records.logits))):
        size, digest = write_shard(path / shard_name("views", view), [[record]], 1)
        shards.append(ShardInfo(records=1, bytes=size, sha256=digest, kl=0.0, max_error=0.0))
    split = SplitManifest(dataset=source.spec.dataset, shards=tuple(shards))
    publish_metadata(path, {"views": split}, digest=source.spec.digest(), codec=codec)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc")
def test_store_of_many_shards_is_read_with_a_bounded_number_of_open_files(
    make_store: MakeStore, data_dir: Path, tmp_path: Path
):
    epochs, batch_size = 6, 6
    source = make_store("six_epochs", epochs=epochs)
    write_single_record_shards(StoreReader(source), tmp_path / "store")
    views = epochs * stores.N
    assert len(list((tmp_path / "store").glob("views.array_record-*"))) == views == 102
    view_input = replay(tmp_path / "store", data_dir, batch_size=batch_size).input
    most, batches = 0, []
    for batch in view_input.batches(np.arange(0, views, batch_size), threads=1):
        batches.append(batch["crops"].numpy())
        most = max(most, len(open_files(tmp_path / "store")))
    assert 1 < most <= 64 + 2 * (batch_size + 2)  # plus the files of the batches in progress
    assert isinstance(view_input.records, SplitReader)
    assert view_input.records.read(np.array([0])).example.shape == (1,)  # the oldest file is opened again
    # The batches do not depend on where shards begin.
    expected = numpy_batches(replay(source, data_dir, batch_size=batch_size), 0, views // batch_size)
    np.testing.assert_array_equal(batches, [batch["crops"] for batch in expected])
