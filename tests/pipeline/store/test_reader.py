"""pipeline.store.reader: what was published, exactly, or an error that names file and both sides."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import DataError, UserError
from pipeline.inputs.dataset import Dataset
from pipeline.storage.files import sha256_of
from pipeline.store import openers
from pipeline.store.metadata import load_manifest
from pipeline.store.reader import StoreReader
from pipeline.store.serialization import serialize
from pipeline.store.shards import shard_name, write_shard
from pipeline.store.spec import SPEC_FILE, Spec
from pipeline.views.input import ViewInput
from pipeline.views.records import SampledViews
from pipeline.views.source import ImageSource
from tests.stores import BATCH, CLASSES, DATASET, N, shard_files

VIEWS = 3 * N
PLAIN_TFDS = """
import importlib.util, json, sys
import tensorflow_datasets as tfds
assert importlib.util.find_spec("pipeline") is None
builder = tfds.builder_from_directory(sys.argv[1])
records = list(builder.as_data_source(sys.argv[2]))
print(json.dumps({
    "dtypes": {name: str(feature.np_dtype) for name, feature in builder.info.features.items()},
    "array_dtypes": {name: str(records[0][name].dtype) for name in ("box", "logits")},
    "array_shapes": {name: list(records[0][name].shape) for name in ("box", "logits")},
    "example": [int(r["example"]) for r in records],
    "crop_hash": [int(r["crop_hash"]) for r in records],
    "mixup_ratio": [float(r["mixup_ratio"]) for r in records],
    "logits": [r["logits"].tolist() for r in records],
}))
"""


def test_coverage(published_store: Path) -> None:
    store = StoreReader(published_store)
    assert (store.views.num_records, store.epochs, store.eval_splits) == (VIEWS, 3, ["test"])
    assert [shard.records for shard in store.views.manifest.shards] == [20, 20, 11]


def test_replay_gives_the_drawn_views_again_bit_for_bit(published_store: Path, data_dir: Path) -> None:
    """On the data set, across shard and epoch ends, in shuffled order; a replay draws nothing."""
    store = StoreReader(published_store)
    spec, dataset = store.spec, Dataset(DATASET, "train", data_dir=data_dir)
    drawn = SampledViews(policy=spec.policy, seed=spec.seed, num_examples=N, num_classes=CLASSES)
    starts = np.array([0, 18, 44, 16, 36])
    inputs = [
        ViewInput(records, ImageSource(dataset, spec.policy.renderer(), cache_bytes=cache), BATCH)
        for records, cache in ((drawn, 0), (store.views, 0), (store.views, 1 << 30))
    ]
    for first, *replays in zip(*(views.batches(starts) for views in inputs), strict=True):
        for replay in replays:
            for name in ("crops", "partner", "views", "example", "box", "flip", "ratio", "found_crop_hash"):
                np.testing.assert_array_equal(first[name].numpy(), replay[name].numpy(), err_msg=name)
            assert replay["stored"].numpy().all()
            np.testing.assert_array_equal(replay["crop_hash"], first["found_crop_hash"])


def test_records_in_any_order_and_repeated(published_store: Path) -> None:
    views = StoreReader(published_store).views
    everything = views.read(np.arange(VIEWS))
    wanted = np.array([50, 19, 20, 50, 0, 39, 40])
    some = views.read(wanted)
    for name in ("example", "box", "flip", "ratio", "crop_hash", "source_hash", "logits"):
        np.testing.assert_array_equal(getattr(some, name), getattr(everything, name)[wanted], err_msg=name)


@pytest.mark.parametrize("view", [-1, VIEWS])
def test_views_outside_the_store(published_store: Path, view: int) -> None:
    with pytest.raises(IndexError):
        StoreReader(published_store).views.read(np.array([0, view]))


def test_more_shards_than_are_kept_open(published_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.store.openers._OPEN_SHARDS", 1)
    views = StoreReader(published_store).views
    expected = StoreReader(published_store).views.read(np.arange(VIEWS))
    for _ in range(2):
        np.testing.assert_array_equal(views.read(np.arange(VIEWS)).logits, expected.logits)
    assert len(views.opener._readers) == 1


def test_readable_by_tfds_without_our_code(published_store: Path, tmp_path: Path) -> None:
    """In another process, isolated from this directory: `-I` and a working directory elsewhere."""
    found = {}
    for directory, split in ((published_store, "views[17:34]"), (published_store / "eval", "test")):
        # The project is installed in this environment, editable: its finder goes with `-S`, and the
        # packages come back by path, where nothing of ours lies.
        packages = [path for path in sys.path if path.endswith("site-packages")]
        code = f"import sys; sys.path += {packages!r}\n{PLAIN_TFDS}"
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", code, str(directory), split],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        found[split] = json.loads(done.stdout)
    views = found["views[17:34]"]
    assert views["dtypes"] == {
        "example": "int64",
        "box": "int32",
        "flip": "bool",
        "mixup_ratio": "float32",
        "crop_hash": "uint32",
        "source_hash": "uint32",
        "logits": "float16",
    }
    assert views["array_dtypes"] == {"box": "int32", "logits": "float16"}
    assert views["array_shapes"] == {"box": [4], "logits": [CLASSES]}
    ours = StoreReader(published_store).views.read(np.arange(17, 34))
    assert sorted(views["example"]) == list(range(17))
    assert views["example"] == ours.example.tolist()
    assert views["crop_hash"] == ours.crop_hash.tolist()
    assert max(views["crop_hash"]) >= 2**31  # so that a signed 32-bit column would show
    assert views["mixup_ratio"] == ours.ratio.tolist()
    assert views["logits"] == ours.logits.tolist()
    assert found["test"]["example"] == list(range(7))


def test_a_flipped_byte_is_refused_with_both_checksums(store: Path) -> None:
    path = store / shard_name("views", 1)
    data = bytearray(path.read_bytes())
    data[66_000] ^= 1
    path.write_bytes(data)
    views = StoreReader(store).views
    views.read(np.arange(20))  # the shard before it is whole
    with pytest.raises(DataError, match=r"00001: sha256 is (\w{16}) here, (?!\1)\w{16} in the manifest"):
        views.read(np.array([25]))


def test_200_flipped_bytes_are_all_refused(store: Path) -> None:
    path = store / shard_name("views", 0)
    whole = path.read_bytes()
    views = StoreReader(store).views
    generator = np.random.default_rng(1)
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[int(generator.integers(len(whole)))] ^= int(generator.integers(1, 256))
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="sha256"):
            views.verify(0)
    path.write_bytes(whole)
    views.verify(0)


@pytest.mark.parametrize("kept", [0, 1000, 131_071])
def test_a_truncated_shard_is_refused_with_both_sizes(store: Path, kept: int) -> None:
    path = store / shard_name("views", 2)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match=f"00002: {kept} bytes here, {size} in the manifest"):
        StoreReader(store).views.read(np.array([45]))


def test_a_missing_shard_is_refused(store: Path) -> None:
    (store / shard_name("views", 0)).unlink()
    with pytest.raises(DataError, match=r"views\.array_record-00000: "):
        StoreReader(store).views.read(np.array([0]))


def test_swapped_shards_are_refused(store: Path) -> None:
    first, second = (store / shard_name("views", i) for i in (0, 1))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    with pytest.raises(DataError, match="sha256"):
        StoreReader(store).views.read(np.array([0]))


def forged(store: Path) -> bytes:
    """The first shard with another logit, and everything else as it was."""
    opened = StoreReader(store)
    codec, info = opened.spec.make_codec(), opened.views.manifest.shards[0]
    records = opened.views.read(np.arange(info.records))
    records.logits[3] += 1
    path = store / "forged"
    write_shard(path, [serialize(records, codec.encode(records.logits))], info.records)
    data = path.read_bytes()
    path.unlink()
    return data


def test_a_shard_that_is_replaced_after_it_was_verified_is_not_read(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only some shards are kept open; what is opened again may be another file by then."""
    data, path = forged(store), store / shard_name("views", 0)
    monkeypatch.setattr(openers, "_OPEN_SHARDS", 1)
    views = StoreReader(store).views
    before = views.read(np.array([3, 25])).logits
    other = path.with_name("other")
    other.write_bytes(data)
    os.utime(other, ns=(path.stat().st_mtime_ns, path.stat().st_mtime_ns))
    keep = path.with_name("keep")
    path.rename(keep)
    other.rename(path)
    with pytest.raises(DataError, match=r"views\.array_record-00000: "):
        views.read(np.array([3]))
    keep.rename(path)
    assert (views.read(np.array([3, 25])).logits == before).all()


def test_a_shard_that_is_replaced_while_it_is_verified_is_not_read(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, path = forged(store), store / shard_name("views", 0)

    def replace(found: Path) -> str:
        digest = sha256_of(found)
        found.rename(path.with_name("old"))
        path.write_bytes(data)
        return digest

    monkeypatch.setattr("pipeline.store.shards.sha256_of", replace)
    with pytest.raises(DataError, match=r"views\.array_record-00000: "):
        StoreReader(store).views.read(np.array([3]))


def test_a_changed_spec_is_refused_with_both_digests(store: Path) -> None:
    text = (store / SPEC_FILE).read_text()
    (store / SPEC_FILE).write_text(text.replace('"seed": 0', '"seed": 1'))
    digest = json.loads(text)["digest"]
    with pytest.raises(DataError, match=digest[:16]):
        StoreReader(store)


def test_a_spec_from_another_store_is_refused_with_both_digests(store: Path) -> None:
    spec = Spec.load(store)
    other = dataclasses.replace(spec, seed=1)
    (store / SPEC_FILE).write_text(other.to_json())
    with pytest.raises(DataError, match=f"{spec.digest()[:16]}.*{other.digest()[:16]}"):
        StoreReader(store)


def test_a_swapped_data_set_is_refused_with_both_sides(
    published_store: Path, data_dir: Path, other_data_dir: Path
) -> None:
    store = StoreReader(published_store)
    store.check_dataset(Dataset(DATASET, "train", data_dir=data_dir).identity())
    other = Dataset(DATASET, "train", data_dir=other_data_dir).identity()
    with pytest.raises(DataError) as caught:
        store.check_dataset(other)
    assert f"fingerprint: {other.fingerprint} here" in str(caught.value)
    assert f"{store.spec.dataset.fingerprint} in the store" in str(caught.value)
    with pytest.raises(DataError, match="split: test here, train in the store"):
        store.check_dataset(Dataset(DATASET, "test", data_dir=data_dir).identity())


def test_swapped_pixels_are_refused_though_the_metadata_agree(
    published_store: Path, other_data_dir: Path
) -> None:
    """The metadata's fingerprint is cheap; the content is checked view by view, even with the cache."""
    store = StoreReader(published_store)
    other = Dataset(DATASET, "train", data_dir=other_data_dir)
    for cache_bytes in (0, 1 << 30):
        source = ImageSource(other, store.spec.policy.renderer(), cache_bytes=cache_bytes)
        with pytest.raises(DataError, match=r"view 0 \(example \d+\): source fingerprint is .* in the store"):
            next(ViewInput(store.views, source, BATCH).batches(np.array([0])))


def test_evaluation_split(published_store: Path, data_dir: Path) -> None:
    store = StoreReader(published_store)
    reader = store.eval_reader("test")
    records = reader.read(np.arange(7))
    assert records.example.tolist() == list(range(7))
    assert (records.ratio == 1).all()
    assert not records.flip.any()
    store.check_dataset(Dataset(DATASET, "test", data_dir=data_dir).identity(), split="test")
    with pytest.raises(UserError, match=r"`eval_split`=validation: .*\btest\b"):
        store.eval_reader("validation")


def test_an_unfinished_store_says_how_to_finish_it(store: Path) -> None:
    (store / "dataset_info.json").unlink()
    with pytest.raises(UserError, match=r"`store`=.* python -m pipeline\.precompute"):
        StoreReader(store)


def test_of_a_store_that_ends_inside_an_epoch_the_whole_epochs_are_read(store: Path) -> None:
    """As while its precompute is running."""
    info = json.loads((store / "dataset_info.json").read_text())
    info["splits"][0]["shardLengths"] = info["splits"][0]["shardLengths"][:2]
    (store / "dataset_info.json").write_text(json.dumps(info))
    opened = StoreReader(store)
    assert (opened.epochs, opened.views.num_records, opened.views.manifest.records) == (2, 34, 40)
    with pytest.raises(IndexError):
        opened.views.read(np.array([34]))
    info["splits"][0]["shardLengths"] = ["13"]
    (store / "dataset_info.json").write_text(json.dumps(info))
    manifest = json.loads((store / "manifest.json").read_text())
    manifest["splits"]["views"]["shards"][0]["records"] = 13
    (store / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="`store`="):
        StoreReader(store)


def test_reading_changes_nothing(published_store: Path) -> None:
    before = shard_files(published_store)
    store = StoreReader(published_store)
    store.views.read(np.arange(VIEWS))
    assert shard_files(published_store) == before
    assert load_manifest(published_store, digest=store.spec.digest())["views"].records == VIEWS
