"""pipeline.precomputing.shard_sink: shards into a bucket, written, read back, noted and adopted; on a disk see test_worker."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import DataError, TryAgainError
from pipeline.precomputing.shard_sink import BucketShardSink, LocalShardSink, note_name, open_sink
from pipeline.storage.bucket import BucketDirectory
from pipeline.storage.lease import check_lease, hold_lease
from pipeline.storage.lock import LOCK_FILE
from pipeline.store.shards import ShardInfo, ShardTask
from tests.buckets import Fault, FaultyLink, point_at

TASK = ShardTask(split="views", number=3, first=6, records=2)
CHUNKS = [[b"one"], [b"two"]]


@pytest.fixture
def bucket(s3: str) -> BucketDirectory:
    return BucketDirectory(s3)


def info_of(size: int, sha256: str) -> ShardInfo:
    return ShardInfo(records=2, bytes=size, sha256=sha256, kl=0.0, max_error=0.0)


@pytest.mark.parametrize("split", ["views", "test"])
def test_a_shard_is_written_noted_and_adopted(bucket: BucketDirectory, split: str) -> None:
    task = dataclasses.replace(TASK, split=split)
    with hold_lease(bucket) as lease:
        sink = BucketShardSink(bucket, "digest", lease)
        assert sink.finished(task) is None
        size, sha256 = sink.write(task, CHUNKS)
        sink.note(task, info_of(size, sha256))
        assert sink.finished(task) == info_of(size, sha256)
        sink.check(task, info_of(size, sha256))
        assert sink.finished(dataclasses.replace(task, first=7)) is None
        assert BucketShardSink(bucket, "another", lease).finished(task) is None
        below = "" if split == "views" else "eval/"
        name = f"{below}{split}.array_record-00003"
        assert set(bucket.objects()) == {name, f"{below}pending/{split}.array_record-00003.json", ".lock"}
        content = bucket.read(name, limit=size)
        bucket.write(name, content[:-1] + b"\1")
        assert sink.finished(task) is None  # as large, and another version
        with pytest.raises(DataError, match="it is damaged there"):
            sink.check(task, info_of(size, sha256))
        bucket.write(name, content)
        sink.check(task, info_of(size, sha256))
        bucket.write(note_name(task), b"{")
        assert sink.finished(task) is None
        sink.remove(task)
        assert set(bucket.objects()) == {".lock"}


def test_what_is_written_is_what_a_disk_gets(bucket: BucketDirectory, tmp_path: Path) -> None:
    with hold_lease(bucket) as lease:
        assert BucketShardSink(bucket, "d", lease).write(TASK, CHUNKS) == LocalShardSink(tmp_path, "d").write(
            TASK, CHUNKS
        )
    assert bucket.read(TASK.name, limit=1 << 20) == (tmp_path / TASK.name).read_bytes()


def test_what_an_ended_worker_leaves_is_in_the_commands_directory(
    s3: str, bucket: BucketDirectory, tmp_path: Path
) -> None:
    there = []

    def chunks() -> Iterator[list[bytes]]:
        yield from CHUNKS
        there.extend(path.name for path in (tmp_path / "command").rglob(".tmp-*"))

    (tmp_path / "command").mkdir()
    with hold_lease(bucket) as lease:
        open_sink(s3, digest="d", lease=lease, scratch=tmp_path / "command").write(TASK, chunks())
        open_sink(s3, digest="d", lease=lease, scratch=tmp_path / "on another machine").write(TASK, CHUNKS)
    assert len(there) == 1
    assert list((tmp_path / "command").iterdir()) == []


def test_nothing_is_written_once_the_lock_is_lost(bucket: BucketDirectory) -> None:
    with pytest.raises(TryAgainError):
        BucketShardSink(bucket, "digest", "lost").write(TASK, CHUNKS)
    assert bucket.objects() == {}
    bucket.write(TASK.name, b"published since")
    with pytest.raises(TryAgainError):
        BucketShardSink(bucket, "digest", "lost").note(TASK, info_of(15, "0" * 64))
    assert set(bucket.objects()) == {TASK.name}


def test_a_removal_that_is_tried_again_needs_the_lock_again(
    bucket: BucketDirectory, s3_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run takes the store over while the first removal fails, and publishes a shard of that name."""

    def faults(method: str, path: str, number: int) -> Fault:
        if method == "DELETE":
            bucket.write(LOCK_FILE, b'{"lease": "another"}')
            return Fault(status=503)
        return Fault()

    with hold_lease(bucket) as lease, FaultyLink(s3_port, faults) as link:
        bucket.write(TASK.name, b"published since")
        point_at(link.port, monkeypatch)
        with pytest.raises(TryAgainError):
            BucketShardSink(BucketDirectory(bucket.url), "digest", lease).remove(TASK)
    assert bucket.read(TASK.name, limit=100) == b"published since"


@pytest.mark.parametrize("stolen", [False, True])
def test_a_shard_that_is_gone_before_it_is_read_back_is_tried_again(
    bucket: BucketDirectory, s3_port: int, monkeypatch: pytest.MonkeyPatch, stolen: bool
) -> None:
    def faults(method: str, path: str, number: int) -> Fault:
        if method in ("HEAD", "GET") and path.endswith(TASK.name):
            bucket.remove(TASK.name)
            if stolen:
                bucket.write(LOCK_FILE, b'{"lease": "another"}')
        return Fault()

    with hold_lease(bucket) as lease, FaultyLink(s3_port, faults) as link:
        point_at(link.port, monkeypatch)
        sink = BucketShardSink(BucketDirectory(bucket.url), "digest", lease)
        with pytest.raises(TryAgainError) as caught:
            sink.write(TASK, CHUNKS)
        assert (TASK.name in str(caught.value)) != stolen
        with pytest.raises(TryAgainError):
            sink.note(TASK, info_of(15, "0" * 64))


def test_who_slept_before_an_upload_does_not_replace_what_was_published_since(
    bucket: BucketDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run has broken the lock in the meantime, and cut its shards elsewhere."""

    def sleep(bucket: BucketDirectory, lease: str) -> None:
        check_lease(bucket, lease)
        bucket.write(TASK.name, b"published since")
        bucket.write(LOCK_FILE, b'{"lease": "another"}')

    monkeypatch.setattr("pipeline.precomputing.shard_sink.check_lease", sleep)
    with (
        hold_lease(bucket) as lease,
        pytest.raises(TryAgainError),
    ):
        BucketShardSink(bucket, "digest", lease).write(TASK, CHUNKS)
    assert bucket.read(TASK.name, limit=100) == b"published since"


@pytest.mark.parametrize("remote", [False, True], ids=["disk", "bucket"])
def test_a_duplicate_of_other_content_does_not_replace_the_first(
    bucket: BucketDirectory, tmp_path: Path, remote: bool
) -> None:
    """The same content may be written again: the task's first run died before its note."""
    with hold_lease(bucket) as lease:
        sink = open_sink(bucket.url if remote else str(tmp_path), digest="d", lease=lease)
        first = sink.write(TASK, CHUNKS)
        assert sink.write(TASK, CHUNKS) == first
        with pytest.raises(FileExistsError):
            sink.write(TASK, [[b"one"], [b"TWO"]])
        sink.check(TASK, info_of(*first))
    assert [path.name for path in tmp_path.iterdir()] == ([] if remote else [TASK.name])


def test_a_repaired_shard_has_to_be_the_same(bucket: BucketDirectory) -> None:
    with hold_lease(bucket) as lease:
        sink = BucketShardSink(bucket, "digest", lease)
        _, sha256 = sink.write(TASK, CHUNKS)
        sink.write(dataclasses.replace(TASK, sha256=sha256), CHUNKS)
        with pytest.raises(DataError, match="computed again, its sha256 is "):
            sink.write(dataclasses.replace(TASK, sha256=sha256), [[b"one"], [b"TWO"]])


def test_what_arrives_damaged_is_noticed_when_it_is_read_back(
    bucket: BucketDirectory, s3_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        hold_lease(bucket) as lease,
        FaultyLink(s3_port, lambda m, p, n: Fault(flip=m == "GET" and "array_record" in p)) as link,
    ):
        point_at(link.port, monkeypatch)
        sink = BucketShardSink(BucketDirectory(bucket.url), "digest", lease)
        with pytest.raises(DataError, match=r"array_record-00003: cannot be read: .* it is damaged there"):
            sink.write(TASK, CHUNKS)


def test_the_outlet_goes_by_the_location(s3: str, tmp_path: Path) -> None:
    assert isinstance(open_sink(str(tmp_path), digest="d", lease=None), LocalShardSink)
    assert isinstance(open_sink(s3, digest="d", lease="l"), BucketShardSink)
    with pytest.raises(ValueError, match="without a lease"):
        open_sink(s3, digest="d", lease=None)
