"""gs:// through gcsfs with an emulator of Google Cloud Storage: the same as s3://, since the libraries behave differently."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import UserError
from pipeline.inputs.teacher import fingerprint
from pipeline.precompute import main
from pipeline.storage import retry
from pipeline.storage.bucket import BucketDirectory
from pipeline.storage.copies import copied_dataset, copied_teacher
from pipeline.storage.lock import LOCK_FILE
from pipeline.store.reader import StoreReader
from tests.buckets import Fault, FaultyLink, point_at_gcs
from tests.stores import DATASET, Asked


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VIEW_DISTILL_CACHE", str(tmp_path / "cache"))


def upload(bucket: BucketDirectory, directory: Path, name: str) -> None:
    for path in directory.rglob("*"):
        if path.is_file():
            bucket.upload(path, f"{name}/{path.relative_to(directory).as_posix()}")


def test_objects_are_listed_read_written_and_removed(gcs: str, tmp_path: Path) -> None:
    bucket = BucketDirectory(gcs)
    assert bucket.objects() == {}
    bucket.write("a.json", b"first")
    path, data = tmp_path / "file", b"second" * 100_000
    path.write_bytes(data)
    bucket.upload(path, "below/b")
    assert {name: found.size for name, found in bucket.objects().items()} == {
        "a.json": 5,
        "below/b": len(data),
    }
    assert list(bucket.objects("below")) == ["below/b"]
    assert bucket.read("a.json", limit=5) == b"first"
    before = bucket.objects()["a.json"].version
    bucket.write("a.json", b"other")
    assert bucket.objects()["a.json"].version != before
    with bucket.fetch("below/b", size=len(data), sha256=hashlib.sha256(data).hexdigest()) as file:
        file.seek(0)
        assert file.read() == data
    bucket.download("below/b", tmp_path / "copy", size=len(data))
    assert (tmp_path / "copy").read_bytes() == data
    bucket.remove("a.json")
    bucket.remove("a.json")
    with pytest.raises(FileNotFoundError):
        bucket.read("a.json", limit=5)
    with pytest.raises(UserError, match="gs://no-such-bucket/x"):
        BucketDirectory("gs://no-such-bucket/x").write("a", b"1")


def test_occasional_failures_of_the_server_are_retried(
    gcs: str, gcs_port: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.01)
    data = b"content" * 100_000
    BucketDirectory(gcs).write("file", data)
    failed = []

    def faults(method: str, path: str, number: int) -> Fault:
        if method == "GET" and "alt=media" in path and len(failed) < 3:
            failed.append(number)
            return Fault(status=503)
        return Fault()

    with FaultyLink(gcs_port, faults) as link:
        point_at_gcs(link.port, monkeypatch)
        BucketDirectory(gcs).download("file", tmp_path / "copy", size=len(data))
    assert len(failed) == 3
    assert (tmp_path / "copy").read_bytes() == data


def test_a_store_in_a_bucket_has_the_bytes_of_one_on_a_disk(gcs: str, asked: Asked) -> None:
    """With data set and teacher in the bucket as well."""
    bucket = BucketDirectory(gcs)
    upload(bucket, asked.data_dir, "data")
    upload(bucket, asked.teacher, "teacher")
    assert fingerprint(copied_teacher(f"{gcs}/teacher")) == fingerprint(asked.teacher)
    assert (copied_dataset(DATASET, f"{gcs}/data") / DATASET).is_dir()
    places = {"data_dir": f"{gcs}/data", "teacher": f"{gcs}/teacher", "store": f"{gcs}/store"}
    assert main(dataclasses.replace(asked, **places).flags()) == 0
    assert main(asked.flags()) == 0
    here = {
        path.relative_to(asked.store).as_posix(): path.read_bytes()
        for path in asked.store.rglob("*")
        if path.is_file() and path.name not in ("spec.json", LOCK_FILE)
    }
    stored = BucketDirectory(f"{gcs}/store")
    names = set(stored.objects()) - {"spec.json", LOCK_FILE}
    there = {name: stored.read(name, limit=1 << 30) for name in names}
    assert there == here
    store = StoreReader(f"{gcs}/store")
    store.check_files()
    assert store.views.read(np.arange(51)).logits.shape == (51, 5)
