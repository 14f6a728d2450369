"""pipeline.storage.bucket with a real S3 server, and a connection that fails."""

from __future__ import annotations

import hashlib
import http.server
import time
from pathlib import Path

import pytest

from pipeline.errors import DataError, TryAgainError, UserError
from pipeline.storage.bucket import BucketDirectory, check_url, is_url
from tests.buckets import BUCKET, Answer, Fault, FaultyLink, free_port, point_at, point_at_gcs, put_object


@pytest.mark.parametrize("url", ["http://host/x", "s3://", "gs:///", "file:///tmp/x", "s3a://b/x"])
def test_other_urls_are_refused(url: str) -> None:
    assert is_url(url)
    with pytest.raises(UserError) as caught:
        check_url(url)
    for text in (url, "s3://BUCKET/DIRECTORY", "gs://BUCKET/DIRECTORY"):
        assert text in str(caught.value)


def test_objects_are_listed_read_written_and_removed(s3: str) -> None:
    bucket = BucketDirectory(f"{s3}/")
    assert bucket.url == s3
    assert bucket.objects() == {}
    bucket.write("a.json", b"first")
    bucket.write("below/b", b"second")
    assert {name: found.size for name, found in bucket.objects().items()} == {"a.json": 5, "below/b": 6}
    assert list(bucket.objects("below")) == ["below/b"]
    assert bucket.read("a.json", limit=5) == b"first"
    before = bucket.objects()["a.json"].version
    bucket.write("a.json", b"other")
    assert bucket.read("a.json", limit=5) == b"other"  # no listing or content is kept
    assert bucket.objects()["a.json"].version != before
    bucket.remove("a.json")
    bucket.remove("a.json")
    assert list(bucket.objects()) == ["below/b"]


def test_placeholders_of_directories_are_left_out(s3: str, s3_port: int) -> None:
    """The web consoles of S3 and GCS create them."""
    prefix = s3.removeprefix(f"s3://{BUCKET}/")
    for name in ("", "below/"):
        put_object(s3_port, f"{prefix}/{name}", b"")
    bucket = BucketDirectory(s3)
    assert bucket.objects() == bucket.objects("below") == {}
    bucket.write("below/a", b"1")
    assert list(bucket.objects()) == ["below/a"]


def test_many_are_removed_and_the_first_failure_ends_it(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = BucketDirectory(s3)
    for number in range(20):
        bucket.write(f"{number}", b"")
    bucket.remove_all(f"{number}" for number in range(1, 25))
    assert list(bucket.objects()) == ["0"]
    asked = []

    def refuse(place: str) -> None:
        asked.append(place)
        time.sleep(0.02)
        raise PermissionError("Access Denied")

    monkeypatch.setattr(bucket._files, "rm_file", refuse)
    with pytest.raises(UserError, match=rf"{s3}/\d+.*Access Denied"):
        bucket.remove_all(map(str, range(1000)))
    assert len(asked) < 1000


def test_before_is_called_for_each_attempt_to_write(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket, asked = BucketDirectory(s3), []

    def fail(*_: object, **__: object) -> None:
        raise ConnectionResetError("reset")

    def before() -> None:
        asked.append(1)
        if len(asked) == 3:
            raise TryAgainError("the lock is lost")

    monkeypatch.setattr(bucket._files, "pipe_file", fail)
    with pytest.raises(TryAgainError, match="the lock is lost"):
        bucket.write("a", b"", before=before)


def test_before_is_called_for_each_attempt_to_remove(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket, asked = BucketDirectory(s3), []
    bucket.write("a", b"")

    def fail(*_: object) -> None:
        raise ConnectionResetError("reset")

    def before() -> None:
        asked.append(1)
        if len(asked) % 3 == 0:
            raise TryAgainError("the lock is lost")

    with monkeypatch.context() as patch:
        patch.setattr(bucket._files, "rm_file", fail)
        for remove in (bucket.remove, lambda name, before: bucket.remove_all([name], before=before)):
            with pytest.raises(TryAgainError, match="the lock is lost"):
                remove("a", before=before)
    assert len(asked) == 6
    assert list(bucket.objects()) == ["a"]


def test_missing_and_too_long_objects(s3: str) -> None:
    bucket = BucketDirectory(s3)
    with pytest.raises(FileNotFoundError):
        bucket.read("nothing", limit=10)
    bucket.write("long", b"x" * 11)
    with pytest.raises(ValueError, match="10 bytes"):
        bucket.read("long", limit=10)


@pytest.mark.parametrize("scheme", ["s3", "gcs"])
def test_an_object_is_replaced_only_over_the_known_version(
    scheme: str, request: pytest.FixtureRequest
) -> None:
    bucket = BucketDirectory(request.getfixturevalue(scheme))
    first = bucket.replace("lock", b"mine", version=None)
    assert bucket.read_version("lock", limit=10) == (b"mine", first)
    second = bucket.replace("lock", b"mine, too", version=first)
    assert second != first
    for version in (None, first):
        with pytest.raises(FileExistsError):
            bucket.replace("lock", b"yours", version=version)
        with pytest.raises(FileExistsError):
            bucket.replace("lock", b"yours, and longer", version=version)
        # As after an attempt whose response was lost.
        assert bucket.replace("lock", b"mine, too", version=version) == second
    assert bucket.read_version("lock", limit=10) == (b"mine, too", second)
    bucket.remove("lock")
    with pytest.raises(FileExistsError):
        bucket.replace("lock", b"mine again", version=second)
    assert bucket.objects() == {}


@pytest.mark.parametrize("scheme", ["s3", "gcs"])
def test_content_belongs_to_the_version(
    scheme: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    url: str = request.getfixturevalue(scheme)
    direct, written = BucketDirectory(url), []
    direct.write("file", b"first")

    def faults(method: str, path: str, number: int) -> Fault:
        """Another process writes between the requests for version and content."""
        if method == "GET" and ("alt=media" in path or scheme == "s3") and len(written) < 2:
            written.append(number)
            direct.write("file", b"%05d" % number)
        return Fault()

    with FaultyLink(request.getfixturevalue(f"{scheme}_port"), faults) as link:
        direct.read("file", limit=10)  # connected
        (point_at if scheme == "s3" else point_at_gcs)(link.port, monkeypatch)
        data, version = BucketDirectory(url).read_version("file", limit=10)
    assert len(written) == 2
    assert (data, version) == direct.read_version("file", limit=10)


class NoCondition(FaultyLink):
    """Connection to a server that does not report which condition failed."""

    def answer(self, handler: http.server.BaseHTTPRequestHandler, sent: bytes | None) -> Answer:
        status, headers, body = super().answer(handler, sent)
        return status, headers, body.replace(b"<Condition>If-None-Match</Condition>", b"")


@pytest.mark.parametrize(
    ("scheme", "size"),
    [("s3", 1), ("s3", 101 << 20), ("gcs", 1), ("gcs", 6 << 20)],
    ids=["s3", "s3 in parts", "gcs", "gcs in parts"],
)
def test_an_upload_with_create_replaces_nothing(
    scheme: str, size: int, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    url: str = request.getfixturevalue(scheme)
    path = tmp_path / "shard"
    with path.open("wb") as file:
        file.truncate(size)
    BucketDirectory(url).write("shard", b"first")
    with NoCondition(request.getfixturevalue(f"{scheme}_port"), lambda *_: Fault()) as link:
        (point_at if scheme == "s3" else point_at_gcs)(link.port, monkeypatch)
        with pytest.raises(FileExistsError):
            BucketDirectory(url).upload(path, "shard", create=True)
        assert BucketDirectory(url).read("shard", limit=10) == b"first"


def test_a_missing_bucket_is_one_line(s3: str) -> None:
    with pytest.raises(UserError, match="s3://no-such-bucket/x"):
        BucketDirectory("s3://no-such-bucket/x").write("a", b"")


def test_missing_credentials_are_one_line(s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(UserError, match="Unable to locate credentials"):
        BucketDirectory(s3).write("a", b"")


def test_a_missing_extra_is_named(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.filesystem", missing)
    with pytest.raises(UserError, match=r"pip install 'view-distill\[s3\]'"):
        BucketDirectory(s3)


CONTENT = bytes(range(256)) * 40_000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def uploaded(s3: str, tmp_path: Path) -> str:
    """URL of a directory with `shard`, of 10 MB."""
    path = tmp_path / "shard"
    path.write_bytes(CONTENT)
    BucketDirectory(s3).upload(path, "shard")
    return s3


def test_a_fetched_file_has_no_name_and_leaves_nothing(uploaded: str, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with BucketDirectory(uploaded).fetch("shard", size=len(CONTENT), sha256=SHA256, scratch=scratch) as file:
        file.seek(0)
        assert file.read() == CONTENT
        assert list(scratch.iterdir()) == []
    kept = [str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert not [name for name in kept if str(scratch) in name]


@pytest.mark.parametrize(
    "fault", [Fault(drop=True), Fault(truncate=True), Fault(flip=True), Fault(status=503)], ids=str
)
def test_occasional_failures_of_the_connection_are_retried(
    uploaded: str, s3_port: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: Fault
) -> None:
    failed = []

    def faults(method: str, path: str, number: int) -> Fault:
        if method == "GET" and path.endswith("/shard") and len(failed) < 2:
            failed.append(number)
            return fault
        return Fault()

    with FaultyLink(s3_port, faults) as link:
        point_at(link.port, monkeypatch)
        bucket = BucketDirectory(uploaded)
        with bucket.fetch("shard", size=len(CONTENT), sha256=SHA256) as file:
            file.seek(0)
            assert file.read() == CONTENT
        failed.clear()
        if not fault.flip:  # which only a checksum shows
            bucket.download("shard", tmp_path / "copy", size=len(CONTENT))
            assert (tmp_path / "copy").read_bytes() == CONTENT
        assert len(failed) == (2 if not fault.flip else 0)


def test_a_damaged_object_is_refused_with_both_sides(uploaded: str, s3: str) -> None:
    bucket = BucketDirectory(s3)
    bucket.write("shard", CONTENT[:-1] + b"\0")
    with pytest.raises(DataError) as caught:
        bucket.fetch("shard", size=len(CONTENT), sha256=SHA256)
    for text in ("/shard", "10,240,000", hashlib.sha256(CONTENT[:-1] + b"\0").hexdigest()[:16], SHA256[:16]):
        assert text in str(caught.value)


def test_an_object_of_another_size_is_not_fetched(
    uploaded: str, s3_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultyLink(s3_port, lambda *_: Fault()) as link:
        point_at(link.port, monkeypatch)
        with pytest.raises(DataError, match=r"10,240,000.*1,000"):
            BucketDirectory(uploaded).fetch("shard", size=1000, sha256=SHA256)
        assert link.count("GET", "/shard") == 0


def test_an_unreachable_server_is_reported_after_all_attempts(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    point_at(free_port(), monkeypatch)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # of botocore's own, within each of ours
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)
    with pytest.raises(TryAgainError, match=rf"s3://{BUCKET}/.* 8 attempts"):
        BucketDirectory(s3).read("a", limit=1)
