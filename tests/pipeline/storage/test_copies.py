"""pipeline.storage.copies: data sets and teachers in a bucket, copied once per machine."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import pytest

from pipeline.errors import TryAgainError, UserError
from pipeline.inputs.dataset import Dataset
from pipeline.inputs.teacher import Teacher, fingerprint
from pipeline.storage import copies
from pipeline.storage.bucket import BucketDirectory, Object
from pipeline.storage.copies import copied_dataset, copied_teacher, local_copy
from tests import stores
from tests.buckets import BUCKET, Fault, FaultyLink, point_at, put_object, upload_tree
from tests.stores import CLASSES, DATASET, SIZE


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache."""
    monkeypatch.setenv("VIEW_DISTILL_CACHE", str(tmp_path / "cache"))
    in_use: dict[Path, IO[str]] = {}
    monkeypatch.setattr(copies, "_in_use", in_use)
    yield tmp_path / "cache" / "copies"
    for lock in in_use.values():
        lock.close()


def prefix(url: str) -> str:
    return url.removeprefix(f"s3://{BUCKET}/")


@pytest.fixture
def data_url(s3: str, s3_port: int, data_dir: Path) -> str:
    """URL of the TFDS data directory."""
    upload_tree(s3_port, data_dir, prefix(s3))
    return s3


def test_a_data_set_is_the_same_from_a_bucket(data_url: str, data_dir: Path) -> None:
    there, here = Dataset(DATASET, "train", data_dir=data_url), Dataset(DATASET, "train", data_dir=data_dir)
    assert there.identity() == here.identity()
    assert there.read(np.arange(17)) == here.read(np.arange(17))
    assert there.data_dir == data_url


def test_processes_copy_once(
    data_url: str, s3_port: int, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    code = f"from pipeline.storage.copies import copied_dataset; copied_dataset({DATASET!r}, {data_url!r})"
    with FaultyLink(s3_port, lambda *_: Fault(latency=0.02)) as link:
        point_at(link.port, monkeypatch)
        command = [sys.executable, "-c", code]
        processes = [subprocess.Popen(command, stderr=subprocess.DEVNULL) for _ in range(3)]
        assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
        gets = [name for method, name in link.requests if method == "GET" and "array_record" in name]
        assert len(gets) == len(set(gets))
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 1


def test_processes_read_the_same_copy(data_url: str) -> None:
    """This process uses it until it ends. Another one does not wait for that."""
    here = copied_dataset(DATASET, data_url)
    code = f"from pipeline.storage.copies import copied_dataset; print(copied_dataset({DATASET!r}, {data_url!r}))"
    command = [sys.executable, "-c", code]
    there = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=60).stdout
    assert there == f"{here}\n"


def test_only_incomplete_copies_of_killed_processes_are_removed(s3: str, cache: Path) -> None:
    bucket = BucketDirectory(s3)
    bucket.write("file", b"x" * 100)
    under_way = cache / ".tmp-abc"
    under_way.mkdir(parents=True)
    (under_way / "part").write_bytes(b"x" * 200)
    with (cache / "abc.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"200 .*250.*`data_cache_bytes`"):
            local_copy(bucket, bucket.objects(), flag="`data_dir`", limit=250)
        assert (under_way / "part").exists()
    local_copy(bucket, bucket.objects(), flag="`data_dir`", limit=250)
    assert not under_way.exists()


def test_an_object_removed_during_the_copy_is_reported_and_leaves_nothing(s3: str, cache: Path) -> None:
    bucket = BucketDirectory(s3)
    for name in ("a", "b"):
        bucket.write(name, b"x")
    objects = bucket.objects()
    bucket.remove("b")
    with pytest.raises(TryAgainError, match=rf"{s3}.*\bb\b"):
        local_copy(bucket, objects, flag="`data_dir`")
    assert [path.name for path in cache.iterdir() if path.is_dir()] == []


def test_an_object_replaced_during_the_copy_is_not_kept(s3: str, cache: Path) -> None:
    bucket = BucketDirectory(s3)
    for name in ("a", "below/b"):
        bucket.write(name, b"old")
    listed = bucket.objects()
    bucket.write("below/b", b"new")
    with pytest.raises(TryAgainError, match="below/b"):
        local_copy(bucket, listed, flag="`data_dir`")
    assert [path.name for path in cache.iterdir() if path.is_dir()] == []
    bucket.write("below/b", b"old")
    path = local_copy(bucket, bucket.objects(), flag="`data_dir`")
    assert (path / "below" / "b").read_bytes() == b"old"


def test_a_failing_connection_leaves_no_incomplete_copy(
    data_url: str, s3_port: int, monkeypatch: pytest.MonkeyPatch, data_dir: Path
) -> None:
    with FaultyLink(s3_port, lambda m, p, n: Fault(drop=m == "GET" and n % 2 == 0)) as link:
        point_at(link.port, monkeypatch)
        path = copied_dataset(DATASET, data_url)
    for file in data_dir.rglob("*"):
        if file.is_file():
            assert (path / file.relative_to(data_dir)).read_bytes() == file.read_bytes()


def test_changed_objects_are_copied_again(data_url: str, s3_port: int, data_dir: Path) -> None:
    first = copied_dataset(DATASET, data_url)
    (info,) = data_dir.rglob("dataset_info.json")
    put_object(s3_port, f"{prefix(data_url)}/{info.relative_to(data_dir).as_posix()}", b"{}")
    second = copied_dataset(DATASET, data_url)
    assert first != second
    assert (second / info.relative_to(data_dir)).read_bytes() == b"{}"


def test_too_small_a_limit_is_refused_with_both_sizes(data_url: str, cache: Path) -> None:
    with pytest.raises(UserError, match=rf"`data_dir`={data_url}: .*[\d,]+ bytes.* `data_cache_bytes`=10"):
        Dataset(DATASET, "train", data_dir=data_url, data_cache_bytes=10)
    assert not cache.exists()


def test_unused_copies_are_removed(s3: str, cache: Path) -> None:
    bucket = BucketDirectory(s3)
    for name in ("a", "b", "c"):
        bucket.write(f"{name}/file", name.encode() * 100)
    paths = {}
    for name in ("a", "b"):
        paths[name] = local_copy(bucket, bucket.objects(name), flag="`data_dir`", limit=250)
    with pytest.raises(UserError, match=r"200 .*250.*`data_cache_bytes`"):
        local_copy(bucket, bucket.objects("c"), flag="`data_dir`", limit=250)
    copies._in_use.pop(paths["a"]).close()  # its reader has ended
    path = local_copy(bucket, bucket.objects("c"), flag="`data_dir`", limit=250)
    assert (path / "c" / "file").read_bytes() == b"c" * 100
    assert not paths["a"].exists()
    assert paths["b"].exists()


@pytest.mark.parametrize("name", ["/etc/passwd", "../up", "a/../../b"])
def test_names_outside_of_the_copy_are_refused(s3: str, name: str, cache: Path) -> None:
    with pytest.raises(UserError, match=repr(name)):
        local_copy(BucketDirectory(s3), {name: Object(1, "x")}, flag="`data_dir`")
    assert not cache.exists()


def test_the_highest_version_and_the_only_configuration_are_the_default(s3: str) -> None:
    bucket = BucketDirectory(s3)
    for version in ("1.2.0", "1.10.0"):
        bucket.write(f"photos/small/{version}/dataset_info.json", b"{}")
    assert (copied_dataset("photos", s3) / "photos/small/1.10.0/dataset_info.json").is_file()
    assert (copied_dataset("photos/small:1.2.0", s3) / "photos/small/1.2.0/dataset_info.json").is_file()
    bucket.write("photos/large/1.0.0/dataset_info.json", b"{}")
    with pytest.raises(UserError, match="photos/large, photos/small"):
        copied_dataset("photos", s3)
    with pytest.raises(UserError, match=f"`dataset`=photos:9.0.0: .*`data_dir`={s3}.*photos/large/1.0.0"):
        copied_dataset("photos:9.0.0", s3)
    with pytest.raises(UserError, match=f"`dataset`=pictures: .*`data_dir`={s3}"):
        copied_dataset("pictures", s3)


def test_teachers_are_the_same_from_a_bucket(
    s3: str, s3_port: int, teacher_path: Path, tmp_path: Path
) -> None:
    upload_tree(s3_port, teacher_path, f"{prefix(s3)}/saved")
    for directory in ("saved", "saved/variables"):  # as web consoles create them
        put_object(s3_port, f"{prefix(s3)}/{directory}/", b"")
    assert fingerprint(copied_teacher(f"{s3}/saved/")) == fingerprint(teacher_path)
    Teacher(f"{s3}/saved", image_size=SIZE, num_classes=CLASSES)
    keras = tmp_path / "teacher.keras"
    stores.keras_teacher().save(keras)
    put_object(s3_port, f"{prefix(s3)}/teacher.keras", keras.read_bytes())
    assert fingerprint(copied_teacher(f"{s3}/teacher.keras")) == fingerprint(keras)
    with pytest.raises(UserError, match=f"`teacher`={s3}/nothing"):
        copied_teacher(f"{s3}/nothing")


def test_for_a_teacher_of_one_file_nothing_else_is_listed(
    s3: str, s3_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("teacher.keras", "other"):
        put_object(s3_port, f"{prefix(s3)}/{name}", b"x")
    with FaultyLink(s3_port, lambda *_: Fault()) as link:
        point_at(link.port, monkeypatch)
        copied_teacher(f"{s3}/teacher.keras")
        assert link.count("GET", "list-type=2") == link.count("GET", "teacher.keras%2F") == 2


def test_a_cache_that_cannot_be_written_is_one_line(
    data_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("VIEW_DISTILL_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=f"{tmp_path}/file.*VIEW_DISTILL_CACHE"):
        copied_dataset(DATASET, data_url)
