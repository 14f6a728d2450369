"""pipeline.precomputing.shard_sink: shards written, read back, noted, adopted and removed; see also test_worker."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import DataError, TryAgainError
from pipeline.precomputing.shard_sink import (
    BucketShardSink,
    LocalShardSink,
    OpenShard,
    ShardSink,
    note_name,
    open_sink,
)
from pipeline.storage.bucket import BucketDirectory
from pipeline.storage.lease import check_lease, hold_lease
from pipeline.storage.lock import LOCK_FILE
from pipeline.store.shards import ShardTask
from pipeline.store.softmax import fidelity
from pipeline.store.spec import Spec
from pipeline.views.records import ViewRecords
from tests.buckets import Fault, FaultyLink, point_at
from tests.stores import CLASSES

TASK = ShardTask(split="views", number=3, first=6, records=2)


@pytest.fixture
def bucket(s3: str) -> BucketDirectory:
    return BucketDirectory(s3)


def records(count: int = 1, *, logit: float = 0.1) -> ViewRecords:
    return ViewRecords(
        example=np.arange(count),
        box=np.ones((count, 4), np.int32),
        flip=np.zeros(count, bool),
        ratio=np.full(count, 0.5, np.float32),
        crop_hash=np.arange(count),
        source_hash=np.arange(count),
        stored=np.zeros(count, bool),
        logits=np.full((count, CLASSES), logit, np.float32),
    )


def write(sink: ShardSink, task: ShardTask = TASK, *, logit: float = 0.1) -> OpenShard:
    with sink.open(task) as shard:
        shard.write(records())
        shard.write(records(logit=logit))
    return shard


@pytest.mark.parametrize("split", ["views", "test"])
def test_a_shard_is_written_noted_and_adopted(bucket: BucketDirectory, spec: Spec, split: str) -> None:
    task = dataclasses.replace(TASK, split=split)
    with hold_lease(bucket) as lease:
        sink = BucketShardSink(bucket, spec, lease)
        assert sink.finished(task) is None
        info = write(sink, task).info
        assert sink.finished(task) == info
        sink.check(task, info)
        assert sink.finished(dataclasses.replace(task, first=7)) is None
        assert BucketShardSink(bucket, dataclasses.replace(spec, seed=9), lease).finished(task) is None
        below = "" if split == "views" else "eval/"
        name = f"{below}{split}.array_record-00003"
        assert set(bucket.objects()) == {name, f"{below}pending/{split}.array_record-00003.json", ".lock"}
        content = bucket.read(name, limit=info.bytes)
        bucket.write(name, content[:-1] + b"\1")
        assert sink.finished(task) is None  # as large, and another version
        with pytest.raises(DataError, match=name):
            sink.check(task, info)
        bucket.write(name, content)
        sink.check(task, info)
        bucket.write(note_name(task), b"{")
        assert sink.finished(task) is None
        sink.remove(task)
        assert set(bucket.objects()) == {".lock"}


def test_a_bucket_gets_the_bytes_of_a_disk(bucket: BucketDirectory, spec: Spec, tmp_path: Path) -> None:
    with hold_lease(bucket) as lease:
        info = write(BucketShardSink(bucket, spec, lease)).info
    assert write(LocalShardSink(tmp_path, spec)).info == info
    assert bucket.read(TASK.name, limit=1 << 20) == (tmp_path / TASK.name).read_bytes()


def test_the_error_of_the_codec_is_measured(spec: Spec, tmp_path: Path) -> None:
    info = write(LocalShardSink(tmp_path, spec), logit=3.3).info
    codec, logits = spec.make_codec(), np.full((2, CLASSES), 0.1, np.float32)
    logits[1] = 3.3
    kl, error = fidelity(logits, codec.decode(codec.encode(logits)), spec.temperature)
    assert (info.records, info.max_error) == (2, error)
    assert info.kl == pytest.approx(kl / 2)


def test_a_logit_beyond_the_codec_names_its_view(spec: Spec, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="view 7"):
        write(LocalShardSink(tmp_path, spec), logit=1e6)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_record_is_refused(spec: Spec, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=TASK.name), LocalShardSink(tmp_path, spec).open(TASK) as shard:
        shard.write(records())
    assert list(tmp_path.iterdir()) == []


def test_temporary_files_are_in_the_directory_of_the_command(
    s3: str, bucket: BucketDirectory, spec: Spec, tmp_path: Path
) -> None:
    scratch = tmp_path / "command"
    scratch.mkdir()
    with hold_lease(bucket) as lease:
        with open_sink(s3, spec, lease=lease, scratch=scratch).open(TASK) as shard:
            shard.write(records(2))
            assert len(list(scratch.rglob(".tmp-*"))) == 1
        write(open_sink(s3, spec, lease=lease, scratch=tmp_path / "on another machine"))
    assert list(scratch.iterdir()) == []


def test_nothing_is_written_once_the_lock_is_lost(
    bucket: BucketDirectory, spec: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TryAgainError, match=bucket.url):
        write(BucketShardSink(bucket, spec, "lost"))
    assert bucket.objects() == {}
    with hold_lease(bucket) as lease:
        sink = BucketShardSink(bucket, spec, lease)
        upload = sink._upload

        def lose(path: Path, task: ShardTask) -> bool:
            uploaded = upload(path, task)
            bucket.write(LOCK_FILE, b'{"lease": "another"}')
            return uploaded

        monkeypatch.setattr(sink, "_upload", lose)
        with pytest.raises(TryAgainError, match=bucket.url):
            write(sink)
    assert set(bucket.objects()) == {TASK.name, LOCK_FILE}  # without a note


def test_a_removal_that_is_tried_again_needs_the_lock_again(
    bucket: BucketDirectory, spec: Spec, s3_port: int, monkeypatch: pytest.MonkeyPatch
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
        with pytest.raises(TryAgainError, match=bucket.url):
            BucketShardSink(BucketDirectory(bucket.url), spec, lease).remove(TASK)
    assert bucket.read(TASK.name, limit=100) == b"published since"


@pytest.mark.parametrize("stolen", [False, True])
def test_a_shard_that_is_removed_before_it_is_read_back(
    bucket: BucketDirectory, spec: Spec, s3_port: int, monkeypatch: pytest.MonkeyPatch, stolen: bool
) -> None:
    def faults(method: str, path: str, number: int) -> Fault:
        if method in ("HEAD", "GET") and path.endswith(TASK.name):
            bucket.remove(TASK.name)
            if stolen:
                bucket.write(LOCK_FILE, b'{"lease": "another"}')
        return Fault()

    with hold_lease(bucket) as lease, FaultyLink(s3_port, faults) as link:
        point_at(link.port, monkeypatch)
        with pytest.raises(TryAgainError) as caught:
            write(BucketShardSink(BucketDirectory(bucket.url), spec, lease))
        assert (TASK.name in str(caught.value)) != stolen


def test_an_upload_after_a_pause_does_not_replace_what_was_published_since(
    bucket: BucketDirectory, spec: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run has broken the lock in the meantime, and cut its shards elsewhere."""

    def sleep(bucket: BucketDirectory, lease: str) -> None:
        check_lease(bucket, lease)
        bucket.write(TASK.name, b"published since")
        bucket.write(LOCK_FILE, b'{"lease": "another"}')

    monkeypatch.setattr("pipeline.precomputing.shard_sink.check_lease", sleep)
    with (
        hold_lease(bucket) as lease,
        pytest.raises(TryAgainError, match=bucket.url),
    ):
        write(BucketShardSink(bucket, spec, lease))
    assert bucket.read(TASK.name, limit=100) == b"published since"


@pytest.mark.parametrize("remote", [False, True], ids=["disk", "bucket"])
def test_a_duplicate_with_other_content_does_not_replace_the_first(
    bucket: BucketDirectory, spec: Spec, tmp_path: Path, remote: bool
) -> None:
    """The same content may be written again: the first attempt died before its note."""
    with hold_lease(bucket) as lease:
        sink = open_sink(bucket.url if remote else str(tmp_path), spec, lease=lease)
        first = write(sink)
        again = write(sink)
        assert (again.info, again.adopted) == (first.info, False)
        other = write(sink, logit=0.2)
        assert (other.info, other.adopted) == (first.info, True)
        sink.check(TASK, first.info)
        (bucket.remove(note_name(TASK)) if remote else (tmp_path / note_name(TASK)).unlink())
        with pytest.raises(TryAgainError, match=TASK.name):
            write(sink, logit=0.2)
        sink.check(TASK, first.info)
    assert [path.name for path in tmp_path.glob("*.array*")] == ([] if remote else [TASK.name])


def test_a_repaired_shard_has_to_be_the_same(bucket: BucketDirectory, spec: Spec) -> None:
    with hold_lease(bucket) as lease:
        sink = BucketShardSink(bucket, spec, lease)
        first = write(sink).info
        repair = dataclasses.replace(TASK, sha256=first.sha256)
        assert write(sink, repair).info == first
        with pytest.raises(DataError, match=first.sha256[:16]):
            write(sink, repair, logit=0.2)


def test_a_damaged_upload_is_noticed_when_it_is_read_back(
    bucket: BucketDirectory, spec: Spec, s3_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        hold_lease(bucket) as lease,
        FaultyLink(s3_port, lambda m, p, n: Fault(flip=m == "GET" and "array_record" in p)) as link,
    ):
        point_at(link.port, monkeypatch)
        with pytest.raises(DataError, match=TASK.name):
            write(BucketShardSink(BucketDirectory(bucket.url), spec, lease))


def test_the_sink_depends_on_the_location(s3: str, spec: Spec, tmp_path: Path) -> None:
    assert isinstance(open_sink(str(tmp_path), spec, lease=None), LocalShardSink)
    assert isinstance(open_sink(s3, spec, lease="l"), BucketShardSink)
    with pytest.raises(ValueError, match="without a lease"):
        open_sink(s3, spec, lease=None)
