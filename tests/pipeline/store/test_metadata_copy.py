"""pipeline.store.metadata_copy: a store's metadata as they are in a bucket."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from pipeline.errors import DataError, TryAgainError, UserError
from pipeline.storage.bucket import BucketDirectory
from pipeline.store.metadata_copy import MetadataCopy, naming
from tests.buckets import BUCKET, Fault, FaultyLink, point_at, upload_tree


def test_the_metadata_are_copied_and_gone_with_the_copy(
    s3: str, s3_port: int, published_store: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    upload_tree(s3_port, published_store, s3.removeprefix(f"s3://{BUCKET}/"))
    copy = MetadataCopy(BucketDirectory(s3))
    copied = {p.relative_to(copy.path).as_posix() for p in copy.path.rglob("*") if p.is_file()}
    assert copied == {
        f"{below}{name}"
        for below in ("", "eval/")
        for name in ("manifest.json", "features.json", "dataset_info.json")
    } | {"spec.json"}
    for name in copied:
        assert (copy.path / name).read_bytes() == (published_store / name).read_bytes()
    BucketDirectory(s3).remove("eval/features.json")
    copy.refresh()
    assert not (copy.path / "eval" / "features.json").exists()
    del copy
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_what_says_what_is_published_is_written_last_and_read_first(
    s3: str, s3_port: int, published_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload_tree(s3_port, published_store, s3.removeprefix(f"s3://{BUCKET}/"))
    with FaultyLink(s3_port, lambda *_: Fault()) as link:
        point_at(link.port, monkeypatch)
        copy = MetadataCopy(BucketDirectory(s3))
        copy.publish(copy.path)
        names = ("manifest.json", "features.json", "dataset_info.json")
        here = [
            (method, path.rsplit("/", 1)[1])
            for method, path in link.requests
            if method in ("GET", "PUT") and path.endswith(names) and "/eval/" not in path
        ]
    assert here == [
        ("GET", "dataset_info.json"),
        ("GET", "features.json"),
        ("GET", "manifest.json"),
        *(("PUT", name) for name in names),
    ]


def test_what_is_published_first_is_read_last(
    s3: str, s3_port: int, published_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the first publication, read meanwhile, would be views without the evaluation that comes with them."""
    upload_tree(s3_port, published_store, s3.removeprefix(f"s3://{BUCKET}/"))
    with FaultyLink(s3_port, lambda *_: Fault()) as link:
        point_at(link.port, monkeypatch)
        MetadataCopy(BucketDirectory(s3))
        gets = [path for method, path in link.requests if method == "GET" and "list-type" not in path]
    below = ["/eval/" in path for path in gets]
    assert below == sorted(below)
    assert below.count(True) == 3


@pytest.mark.parametrize("scheme", ["s3", "gcs"])
def test_who_wakes_up_after_a_takeover_replaces_no_metadata(
    scheme: str, published_store: Path, request: pytest.FixtureRequest
) -> None:
    """Even between the check of the lock and the write, and where nothing had been published."""
    bucket = BucketDirectory(request.getfixturevalue(scheme))
    names = ("manifest.json", "features.json", "dataset_info.json")

    def fill(copy: MetadataCopy, of: bytes) -> None:
        for name in names:
            (copy.path / name).write_bytes(name.encode() + of)

    for round in (b"1", b"2"):
        sleeper, owner = MetadataCopy(bucket), MetadataCopy(bucket)
        fill(sleeper, b" of the sleeper" + round)
        fill(owner, b" of the owner" + round)
        owner.publish(owner.path)
        with pytest.raises(TryAgainError, match=r"manifest\.json: ") as caught:
            sleeper.publish(sleeper.path)
        assert caught.value.exit_code == 75
        for name in names:
            assert bucket.read(name, limit=100) == name.encode() + b" of the owner" + round
        # The last write of the sleeper's, on its way all the time.
        sleeper._versions["manifest.json"] = owner._versions["manifest.json"]
        sleeper._versions["features.json"] = owner._versions["features.json"]
        with pytest.raises(TryAgainError, match=r"dataset_info\.json: "):
            sleeper.publish(sleeper.path)
        assert bucket.read("dataset_info.json", limit=100) == b"dataset_info.json of the owner" + round


def test_one_copy_publishes_again_and_again(s3: str) -> None:
    copy = MetadataCopy(BucketDirectory(s3))
    for number in range(3):
        for name in ("manifest.json", "features.json", "dataset_info.json"):
            (copy.path / name).write_text(str(number if name != "features.json" else 0))
        copy.publish(copy.path)
        copy.publish(copy.path)
    assert BucketDirectory(s3).read("dataset_info.json", limit=9) == b"2"


def test_a_file_too_long_for_a_store_is_not_read(s3: str) -> None:
    BucketDirectory(s3).write("spec.json", b" " * (1 << 20) + b" ")
    with pytest.raises(DataError, match=rf"{s3}/spec.json: .*1,048,576"):
        MetadataCopy(BucketDirectory(s3))


@pytest.mark.parametrize("kind", [UserError, DataError])
def test_errors_name_the_place_and_keep_their_kind(kind: type[Exception], tmp_path: Path) -> None:
    with pytest.raises(kind, match=r"^s3://b/x/spec.json: bad$"), naming(tmp_path, "s3://b/x"):
        raise kind(f"{tmp_path}/spec.json: bad")
    with pytest.raises(kind, match=r"^other$"), naming(tmp_path, "s3://b/x"):
        raise kind("other")
