"""pipeline.store.metadata: `dataset_info.json` alone says what is published, and it is never taken back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from pipeline.errors import DataError
from pipeline.store.codecs import make_codec
from pipeline.store.metadata import (
    INFO_FILE,
    MANIFEST_FILE,
    SplitManifest,
    load_manifest,
    publish_metadata,
    published_lengths,
)
from pipeline.store.serialization import serialize
from pipeline.store.shards import MAX_SHARDS, ShardInfo, shard_name, write_shard
from pipeline.views.records import ViewRecords
from tests.stores import ANY_DATASET, CODECS

CODEC = make_codec("float16", 7, temperature=2.0)
DIGEST = "d" * 64


def manifest(*lengths: int, kl: float = 0.0, split: str = "train") -> SplitManifest:
    shards = tuple(
        ShardInfo(records=n, bytes=1000 * n, sha256=f"{i:064x}", kl=kl * (i + 1), max_error=0.1 * i)
        for i, n in enumerate(lengths)
    )
    return SplitManifest(dataset=dataclasses.replace(ANY_DATASET, split=split), shards=shards)


def publish(directory: Path, *lengths: int) -> None:
    publish_metadata(directory, {"views": manifest(*lengths)}, digest=DIGEST, codec=CODEC)


def test_round_trip(tmp_path: Path) -> None:
    splits = {"views": manifest(20, 20, 11), "test": manifest(7, split="test")}
    publish_metadata(tmp_path, splits, digest=DIGEST, codec=CODEC)
    assert load_manifest(tmp_path, digest=DIGEST) == splits
    assert published_lengths(tmp_path) == {"views": [20, 20, 11], "test": [7]}
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "dataset_info.json",
        "features.json",
        "manifest.json",
    ]


def test_tfds_reads_the_metadata(tmp_path: Path) -> None:
    publish(tmp_path, 20, 20, 11)
    info = tfds.builder_from_directory(str(tmp_path)).info
    assert info.splits["views"].shard_lengths == [20, 20, 11]
    assert info.splits["views"].num_bytes == 51_000
    assert info.file_format.value == "array_record"
    # No total in the names, so that a store grows without a rename.
    names = [Path(name).name for name in info.splits["views"].filepaths]
    assert names == [f"views.array_record-0000{i}" for i in range(3)]


@pytest.mark.parametrize("name", CODECS)
def test_tfds_reads_the_columns_of_every_codec(tmp_path: Path, name: str) -> None:
    codec, generator = make_codec(name, 7, temperature=2.0), np.random.default_rng(0)
    logits = generator.normal(0, 5, (300, 7)).astype(np.float32)
    zeros = np.zeros(300, np.int64)
    records = ViewRecords(
        example=np.arange(300),
        box=np.zeros((300, 4), np.int32),
        flip=zeros > 0,
        ratio=np.ones(300, np.float32),
        crop_hash=zeros,
        source_hash=zeros,
        stored=zeros == 0,
        logits=logits,
    )
    encoded = codec.encode(logits)
    size, sha256 = write_shard(tmp_path / shard_name("views", 0), [serialize(records, encoded)], 300)
    shard = ShardInfo(records=300, bytes=size, sha256=sha256, kl=0.0, max_error=0.0)
    split = SplitManifest(dataset=ANY_DATASET, shards=(shard,))
    publish_metadata(tmp_path, {"views": split}, digest=DIGEST, codec=codec)
    source = tfds.builder_from_directory(str(tmp_path)).as_data_source("views[100:]")
    for view, record in zip(range(100, 300), source, strict=True):
        assert record["example"] == view
        for column, values in encoded.items():
            np.testing.assert_array_equal(record[column], values[view])
            assert values.ndim == 1 or record[column].dtype == values.dtype


def test_nothing_is_published_in_an_empty_directory(tmp_path: Path) -> None:
    assert published_lengths(tmp_path) == {}
    assert load_manifest(tmp_path, digest=DIGEST) == {}


def test_a_manifest_without_dataset_info_publishes_nothing(tmp_path: Path) -> None:
    publish(tmp_path, 20)
    (tmp_path / INFO_FILE).unlink()
    assert load_manifest(tmp_path, digest=DIGEST) == {}


def test_coverage_comes_from_dataset_info_alone(tmp_path: Path) -> None:
    """A run that died between the two files: the manifest is ahead, and what is ahead is not published."""
    publish(tmp_path, 20, 20)
    old = (tmp_path / INFO_FILE).read_text()
    publish(tmp_path, 20, 20, 20, 9)
    (tmp_path / INFO_FILE).write_text(old)
    loaded = load_manifest(tmp_path, digest=DIGEST)["views"]
    assert [shard.records for shard in loaded.shards] == [20, 20]
    assert loaded.records == 40


def test_a_slice_is_published_under_a_name_that_tfds_takes(tmp_path: Path) -> None:
    splits = {"train[800:]": manifest(7, split="train[800:]"), "test": manifest(3, split="test")}
    publish_metadata(tmp_path, splits, digest=DIGEST, codec=CODEC)
    assert published_lengths(tmp_path) == {"train_from_800": [7], "test": [3]}
    assert load_manifest(tmp_path, digest=DIGEST) == splits
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace("train[800:]", "train[801:]"))
    with pytest.raises(DataError, match=r"train_from_800\b.*train_from_801\b"):
        load_manifest(tmp_path, digest=DIGEST)


def test_coverage_never_shrinks(tmp_path: Path) -> None:
    publish(tmp_path, 20, 20)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for lengths in ((20,), (20, 19, 21), (40,), ()):
        with pytest.raises(DataError, match="split views"):
            publish(tmp_path, *lengths)
    with pytest.raises(DataError, match="split views"):
        publish_metadata(tmp_path, {"test": manifest(7)}, digest=DIGEST, codec=CODEC)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    publish(tmp_path, 20, 20, 5)
    assert published_lengths(tmp_path) == {"views": [20, 20, 5]}


def test_a_manifest_of_another_spec_is_refused_with_both_sides(tmp_path: Path) -> None:
    publish(tmp_path, 20)
    with pytest.raises(DataError, match=rf"{DIGEST[:16]}.*{'e' * 16}"):
        load_manifest(tmp_path, digest="e" * 64)


def test_a_manifest_that_lacks_published_shards_is_refused_with_both_sides(tmp_path: Path) -> None:
    publish(tmp_path, 20)
    old = (tmp_path / MANIFEST_FILE).read_text()
    publish(tmp_path, 20, 20, 5)
    (tmp_path / MANIFEST_FILE).write_text(old)
    with pytest.raises(
        DataError, match=r"1 shards of 20 views in manifest.json, 3 of 45 in dataset_info.json"
    ):
        load_manifest(tmp_path, digest=DIGEST)


@pytest.mark.parametrize(
    "text", ["", "[]", "null", '{"splits": 3}', '{"splits": {"views": {}}}', '{"spec": 3}']
)
def test_a_garbled_manifest_is_refused(tmp_path: Path, text: str) -> None:
    publish(tmp_path, 20)
    (tmp_path / MANIFEST_FILE).write_text(text)
    with pytest.raises(DataError, match=r"manifest\.json: "):
        load_manifest(tmp_path, digest=DIGEST)


def test_a_missing_manifest_is_refused(tmp_path: Path) -> None:
    publish(tmp_path, 20)
    (tmp_path / MANIFEST_FILE).unlink()
    with pytest.raises(DataError, match=r"manifest\.json: .*FileNotFoundError"):
        load_manifest(tmp_path, digest=DIGEST)


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{}", '{"splits": [{"name": "views"}]}', '{"splits": null}']
)
def test_garbled_tfds_metadata_are_refused(tmp_path: Path, text: str) -> None:
    publish(tmp_path, 20)
    (tmp_path / INFO_FILE).write_text(text)
    with pytest.raises(DataError, match=r"dataset_info\.json: "):
        published_lengths(tmp_path)


def test_metadata_of_another_naming_are_refused_with_both_sides(tmp_path: Path) -> None:
    publish(tmp_path, 20)
    info = json.loads((tmp_path / INFO_FILE).read_text())
    info["splits"][0]["filepathTemplate"] = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    (tmp_path / INFO_FILE).write_text(json.dumps(info))
    with pytest.raises(DataError, match=r"SHARD_X_OF_Y.*expected \{SPLIT\}"):
        published_lengths(tmp_path)


def test_five_digits_number_every_shard(tmp_path: Path) -> None:
    shard = ShardInfo(records=1, bytes=1, sha256="0" * 64, kl=0.0, max_error=0.0)
    many = SplitManifest(dataset=ANY_DATASET, shards=(shard,) * (MAX_SHARDS + 1))
    with pytest.raises(DataError, match=r"\b100000\b.*\b99999\b"):
        publish_metadata(tmp_path, {"views": many}, digest=DIGEST, codec=CODEC)
    assert list(tmp_path.iterdir()) == []


def test_fidelity_is_weighed_by_views() -> None:
    cost = manifest(30, 10, kl=1.0).fidelity()
    assert cost["mean_kl"] == pytest.approx((30 * 1 + 10 * 2) / 40)
    assert cost["max_logit_error"] == pytest.approx(0.1)
    assert manifest().fidelity() == {"mean_kl": 0, "max_logit_error": 0}
    assert manifest(30, kl=-1.8e-16).fidelity()["mean_kl"] == 0  # as an older version measured it


def test_fidelity_is_in_the_manifest(tmp_path: Path) -> None:
    publish(tmp_path, 20, 5)
    stated = json.loads((tmp_path / MANIFEST_FILE).read_text())["splits"]["views"]
    assert stated["codec"] == "float16"
    assert stated["fidelity"] == manifest(20, 5).fidelity()
