"""pipeline.store.shards: written whole or not at all, read back exactly, adopted only if exactly right."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import DataError
from pipeline.store.codecs import Codec, make_codec
from pipeline.store.serialization import parse, record_features, serialize
from pipeline.store.shards import (
    PENDING,
    ShardInfo,
    ShardTask,
    adopt_shard,
    estimated_bytes,
    open_shard,
    parse_shard_name,
    shard_name,
    write_note,
    write_shard,
)
from pipeline.views.records import ViewRecords
from tests import stores

CODEC = make_codec("float16", 7, temperature=2.0)
TASK = ShardTask(split="views", number=3, first=60, records=20)
DIGEST = "d" * 64


def make_records(count: int, *, seed: int = 0) -> ViewRecords:
    generator = np.random.default_rng(seed)
    return ViewRecords(
        example=generator.integers(0, 2**40, count),
        box=generator.integers(0, 2**31 - 1, (count, 4)).astype(np.int32),
        flip=generator.random(count) < 0.5,
        ratio=generator.random(count).astype(np.float32),
        crop_hash=generator.integers(0, 2**32, count),
        source_hash=generator.integers(0, 2**32, count),
        stored=np.ones(count, bool),
        logits=generator.normal(0, 5, (count, 7)).astype(np.float32),
    )


def write(path: Path, count: int = 20, *, seed: int = 0) -> ShardInfo:
    records = make_records(count, seed=seed)
    size, sha256 = write_shard(path, [serialize(records, CODEC.encode(records.logits))], count)
    return ShardInfo(records=count, bytes=size, sha256=sha256, kl=0.0, max_error=0.0)


@pytest.mark.parametrize("name", stores.CODECS)
def test_serialize_and_parse_round_trip(name: str) -> None:
    codec, records = make_codec(name, 7, temperature=2.0), make_records(64)
    encoded = codec.encode(records.logits)
    again = parse(serialize(records, encoded), codec)
    for field in dataclasses.fields(ViewRecords):
        expected = codec.decode(encoded) if field.name == "logits" else getattr(records, field.name)
        found = getattr(again, field.name)
        np.testing.assert_array_equal(found, expected, err_msg=field.name)
        assert found.dtype == expected.dtype, field.name


def test_extreme_values_survive() -> None:
    records = dataclasses.replace(
        make_records(1),
        crop_hash=np.array([2**32 - 1]),
        source_hash=np.array([2**31]),
        ratio=np.array([np.float32(1e-38)]),
        box=np.array([[0, 2**31 - 1, 1, 2**31 - 1]], np.int32),
    )
    again = parse(serialize(records, CODEC.encode(records.logits)), CODEC)
    assert (int(again.crop_hash[0]), int(again.source_hash[0])) == (2**32 - 1, 2**31)
    assert again.ratio[0] == records.ratio[0]
    np.testing.assert_array_equal(again.box, records.box)


def test_records_are_in_tfds_own_layout() -> None:
    records = make_records(5)
    serialized = serialize(records, CODEC.encode(records.logits))
    features = record_features(CODEC)
    decoded = features.deserialize_example(serialized[2])
    assert int(decoded["crop_hash"]) == records.crop_hash[2]
    assert bool(decoded["flip"]) == records.flip[2]
    np.testing.assert_array_equal(decoded["logits"], CODEC.encode(records.logits)["logits"][2])


@pytest.mark.parametrize(
    ("codec", "records"),
    [
        (make_codec("float32", 7, temperature=2.0), None),
        (make_codec("float16", 8, temperature=2.0), None),
        (CODEC, [b"garbage"]),
        (CODEC, [b""]),
    ],
    ids=["other_codec", "other_classes", "garbage", "empty"],
)
def test_a_record_of_another_kind_is_refused(codec: Codec, records: list[bytes] | None) -> None:
    if records is None:
        made = make_records(3)
        records = serialize(made, CODEC.encode(made.logits))
    with pytest.raises(DataError, match=f"{codec.num_classes} {codec.name} logits"):
        parse(records, codec)


@pytest.mark.parametrize("count", [1, 600, 9000])
def test_the_estimated_size_is_that_of_the_file_before_compression(tmp_path: Path, count: int) -> None:
    records = make_records(count)
    size, _ = write_shard(tmp_path / "s", [serialize(records, CODEC.encode(records.logits))], count)
    assert 0.7 * size <= estimated_bytes(count, CODEC) <= 1.5 * size


def test_written_shards_are_byte_identical_however_they_are_chunked(tmp_path: Path) -> None:
    records = make_records(600)  # past one group of 256
    serialized = serialize(records, CODEC.encode(records.logits))
    first = write_shard(tmp_path / "a", [serialized], 600)
    second = write_shard(tmp_path / "b", [serialized[:7], [], serialized[7:]], 600)
    assert first == second
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    reader = open_shard(tmp_path / "a", 600)
    assert reader.read([599, 0, 300]) == [serialized[i] for i in (599, 0, 300)]


@pytest.mark.parametrize("records", [19, 21])
def test_a_shard_of_another_length_is_not_published(tmp_path: Path, records: int) -> None:
    made = make_records(20)
    with pytest.raises(DataError, match=f"20 readable records, expected {records}"):
        write_shard(tmp_path / "s", [serialize(made, CODEC.encode(made.logits))], records)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_published_when_the_records_end_in_an_error(tmp_path: Path) -> None:
    def chunks() -> Iterator[list[bytes]]:
        yield [b"one"]
        raise DataError("the teacher broke")

    with pytest.raises(DataError, match="the teacher broke"):
        write_shard(tmp_path / "s", chunks(), 2)
    assert list(tmp_path.iterdir()) == []


def test_open_shard_refuses_missing_truncated_and_longer_files(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with pytest.raises(DataError, match=str(path)):
        open_shard(path, 20)
    write(path)
    open_shard(path, 20).close()
    with pytest.raises(DataError, match=r"\b20\b.*\b21\b"):
        open_shard(path, 21)
    whole = path.read_bytes()
    for length in (0, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match="0 readable records, expected 20"):
            open_shard(path, 20)


def test_names_sort_as_numbers_up_to_the_limit() -> None:
    assert shard_name("views", 0) == "views.array_record-00000"
    assert shard_name("views", 99_998) == "views.array_record-99998"
    assert parse_shard_name("views.array_record-99998") == ("views", 99_998)


@pytest.mark.parametrize(
    "name",
    ["spec.json", "views.array_record-", "views.array_record-1x", ".array_record-1", "v.array_record-²"],
)
def test_other_names_are_no_shard_s(name: str) -> None:
    assert parse_shard_name(name) is None


@pytest.mark.parametrize(
    "changes", [{"records": 0}, {"bytes": 0}, {"sha256": "abc"}, {"records": -5}], ids=str
)
def test_an_impossible_shard_is_refused(changes: dict[str, Any]) -> None:
    fields = {"records": 1, "bytes": 1, "sha256": "0" * 64, "kl": 0.0, "max_error": 0.0}
    with pytest.raises(ValueError, match=r"ShardInfo\("):
        ShardInfo(**(fields | changes))


def noted(store: Path) -> ShardInfo:
    info = write(store / TASK.name)
    (store / PENDING).mkdir()
    write_note(store, TASK, info, digest=DIGEST)
    return info


def test_a_shard_that_a_dead_run_left_is_adopted(tmp_path: Path) -> None:
    info = noted(tmp_path)
    assert adopt_shard(tmp_path, TASK, digest=DIGEST) == info


@pytest.mark.parametrize(
    "changes", [{"number": 4}, {"first": 61}, {"records": 19}, {"split": "train"}], ids=str
)
def test_another_task_does_not_adopt_it(tmp_path: Path, changes: dict[str, Any]) -> None:
    noted(tmp_path)
    other = dataclasses.replace(TASK, **changes)
    # Even where its files lie at the other task's names.
    (tmp_path / TASK.name).rename(tmp_path / other.name)
    (tmp_path / PENDING / f"{TASK.name}.json").rename(tmp_path / PENDING / f"{other.name}.json")
    assert adopt_shard(tmp_path, other, digest=DIGEST) is None


def test_another_spec_does_not_adopt_it(tmp_path: Path) -> None:
    noted(tmp_path)
    assert adopt_shard(tmp_path, TASK, digest="e" * 64) is None


@pytest.mark.parametrize("damage", ["flipped", "truncated", "longer", "missing", "replaced"])
def test_a_damaged_shard_is_not_adopted(tmp_path: Path, damage: str) -> None:
    noted(tmp_path)
    path = tmp_path / TASK.name
    whole = path.read_bytes()
    if damage == "flipped":
        path.write_bytes(whole[:70_000] + bytes([whole[70_000] ^ 1]) + whole[70_001:])
    elif damage == "truncated":
        path.write_bytes(whole[:-1])
    elif damage == "longer":
        path.write_bytes(whole + b"\0")
    else:
        path.unlink()
        if damage == "replaced":
            write(path, seed=1)
    assert adopt_shard(tmp_path, TASK, digest=DIGEST) is None


@pytest.mark.parametrize("text", ["", "[]", "null", '"text"', '{"info": {}}', '{"info": null}', "{"])
def test_a_garbled_note_is_not_believed(tmp_path: Path, text: str) -> None:
    noted(tmp_path)
    (tmp_path / PENDING / f"{TASK.name}.json").write_text(text)
    assert adopt_shard(tmp_path, TASK, digest=DIGEST) is None


def test_a_note_with_other_numbers_is_not_believed(tmp_path: Path) -> None:
    noted(tmp_path)
    path = tmp_path / PENDING / f"{TASK.name}.json"
    note = json.loads(path.read_text())
    note["info"]["records"] = 10
    path.write_text(json.dumps(note))
    assert adopt_shard(tmp_path, TASK, digest=DIGEST) is None


def test_200_flipped_bytes_give_an_error_or_the_right_record(tmp_path: Path) -> None:
    """Even without the manifest's checksum, the file format itself never gives a wrong record."""
    path = tmp_path / "s"
    records = make_records(2000)
    serialized = serialize(records, CODEC.encode(records.logits))
    write_shard(path, [serialized], 2000)
    whole = bytearray(path.read_bytes())
    generator, refused = np.random.default_rng(0), 0
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[int(generator.integers(0, len(damaged)))] ^= int(generator.integers(1, 256))
        path.write_bytes(damaged)
        try:
            reader = open_shard(path, 2000)
            found = reader.read(list(range(2000)))
        except (DataError, RuntimeError, IndexError):
            refused += 1
            continue
        assert found == serialized
    assert refused > 50


def test_no_records_parse_to_none() -> None:
    assert parse([], CODEC).logits.shape == (0, 7)
