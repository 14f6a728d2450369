"""pipeline.storage.lease: one writer per store in a bucket, with processes that are really killed."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pipeline.errors import DataError, TryAgainError, UserError
from pipeline.errors.text import is_printable
from pipeline.storage import lease as module
from pipeline.storage.bucket import BucketDirectory
from pipeline.storage.lease import check_lease, hold_lease, lease_owner
from pipeline.storage.lock import LOCK_FILE
from tests.buckets import Answer, Fault, FaultyLink, point_at, point_at_gcs

HOLD = """
import sys, time
from pipeline.storage.bucket import BucketDirectory
from pipeline.storage.lease import hold_lease
with hold_lease(BucketDirectory(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def bucket(s3: str) -> BucketDirectory:
    return BucketDirectory(s3)


def lock_of(bucket: BucketDirectory) -> dict[str, object]:
    found: dict[str, object] = json.loads(bucket.read(".lock", limit=10_000))
    return found


def test_the_lock_exists_while_it_is_held_and_is_free_afterwards(bucket: BucketDirectory) -> None:
    with hold_lease(bucket) as lease:
        assert lock_of(bucket)["lease"] == lease
        check_lease(bucket, lease)
        owner = lease_owner(bucket)
        assert owner is not None
        assert owner["pid"] == os.getpid()
    assert list(bucket.objects()) == [LOCK_FILE]
    assert lease_owner(bucket) is None
    with pytest.raises(TryAgainError, match=bucket.url):
        check_lease(bucket, lease)
    with hold_lease(bucket) as other:
        assert lock_of(bucket)["lease"] == other != lease


def test_a_killed_owner_on_this_machine_is_detected_at_once(
    bucket: BucketDirectory, capfd: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-c", HOLD, bucket.url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        process.kill()
    assert lock_of(bucket)["pid"] == process.pid
    begun = time.monotonic()
    with hold_lease(bucket):
        assert time.monotonic() - begun < 20
    assert f"process {process.pid} on " in capfd.readouterr().out


HIDDEN = """
import json, os, sys
from pipeline.storage.lease import is_dead, machine_of_processes
owner = {"pid": int(sys.argv[1]), "machine": machine_of_processes()}
os.setgid(65534)
os.setuid(65534)
print(os.path.exists(f"/proc/{owner['pid']}"), is_dead(owner))
"""


def test_an_owner_that_proc_hides_is_not_dead() -> None:
    """With `hidepid=2`, /proc shows a user only processes of the same user."""
    mount = 'mount -t proc -o hidepid=2 proc /proc && exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", mount, "sh", sys.executable, "-c", HIDDEN]
    done = subprocess.run([*command, str(os.getpid())], capture_output=True, text=True)
    if done.stdout == "":
        pytest.skip(f"mounting /proc needs root: {done.stderr.strip()}")
    assert done.stdout == "False False\n"


def test_unused_process_numbers_are_dead_and_impossible_ones_are_not() -> None:
    with subprocess.Popen(["true"]) as process:
        pass
    machine = module.machine_of_processes()
    assert module.is_dead({"pid": process.pid, "machine": machine})
    assert not module.is_dead({"pid": 2**40, "machine": machine})


def test_a_living_owner_is_named(bucket: BucketDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RENEWAL", 0.2)
    with hold_lease(bucket):
        monkeypatch.setattr(module, "is_dead", lambda owner: False)  # it is this very process
        with (
            pytest.raises(UserError, match=f"{bucket.url}.*process {os.getpid()}"),
            hold_lease(bucket, patience=30),
        ):
            pass


def test_a_lock_that_is_not_renewed_is_taken_over(bucket: BucketDirectory) -> None:
    owner = {"lease": "ab", "pid": 1, "machine": "another", "host": "far", "since": "then", "renewals": 3}
    bucket.write(".lock", json.dumps(owner).encode())
    with hold_lease(bucket, patience=0.5) as lease:
        assert lock_of(bucket)["lease"] == lease


def test_text_of_a_foreign_lock_is_escaped(
    bucket: BucketDirectory, capfd: pytest.CaptureFixture[str]
) -> None:
    owner = {"lease": "ab", "pid": "\x1b[2J", "machine": "another", "host": "\x07far", "since": "then\n"}
    bucket.write(".lock", json.dumps(owner).encode())
    with hold_lease(bucket, patience=0.2):
        pass
    assert all(map(is_printable, capfd.readouterr().out.splitlines()))


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff"])
def test_a_lock_without_an_owner_is_taken_over_after_a_while(bucket: BucketDirectory, content: bytes) -> None:
    bucket.write(".lock", content)
    with hold_lease(bucket, patience=0.2):
        pass


def test_a_run_that_lost_the_lock_notices_and_keeps_the_new_one(
    bucket: BucketDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RENEWAL", 0.1)
    with hold_lease(bucket) as lease:
        bucket.write(".lock", json.dumps({"lease": "another"}).encode())
        time.sleep(0.5)
        with pytest.raises(TryAgainError, match=bucket.url):
            check_lease(bucket, lease)
    assert lock_of(bucket) == {"lease": "another"}


def test_the_error_that_ended_the_work_is_raised_though_the_connection_is_down(
    bucket: BucketDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def down(*_: object, **__: object) -> str:
        raise TryAgainError("the link is down")

    with monkeypatch.context() as patch:

        def work() -> None:
            with hold_lease(bucket):
                patch.setattr(BucketDirectory, "replace", down)
                raise KeyError("the work")

        with pytest.raises(KeyError, match="the work"):
            work()
    with hold_lease(bucket):  # its owner is no more
        pass


def test_a_renewal_that_fails_is_not_the_last(
    bucket: BucketDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RENEWAL", 0.05)
    replace, failures = BucketDirectory.replace, [DataError("other bytes came"), RuntimeError("whatever")]

    def fail(*arguments: Any, **keywords: Any) -> str:
        if failures:
            raise failures.pop()
        return replace(*arguments, **keywords)

    with hold_lease(bucket):
        monkeypatch.setattr(BucketDirectory, "replace", fail)
        wait_for(lambda: lock_of(bucket)["renewals"])


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_one_of_several_writers_gets_the_lock(
    bucket: BucketDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "is_dead", lambda owner: False)
    monkeypatch.setattr(module, "RENEWAL", 0.2)
    got, refused, barrier = [], [], threading.Barrier(4)

    def write() -> None:
        barrier.wait()
        try:
            with hold_lease(bucket, patience=30):
                got.append(1)
                time.sleep(3)
        except UserError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused)) == (1, 3)


DEAD = {"lease": "ab", "pid": 1, "machine": "another", "host": "far", "since": "then", "renewals": 3}


@pytest.fixture(params=["s3", "gcs"])
def url(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A directory on a server that handles one request at a time. Locks of this process count as those of others."""
    monkeypatch.setattr(module, "is_dead", lambda owner: False)
    place: str = request.getfixturevalue(request.param)
    if request.param == "gcs":
        yield place
        return
    with FaultyLink(request.getfixturevalue("s3_port"), lambda *_: Fault(), serial=True) as link:
        point_at(link.port, monkeypatch)
        yield place


def test_one_of_many_waiters_takes_over_a_dead_lock_and_keeps_it(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them find it dead at the same moment. None removes the lock of the one that took it over."""
    monkeypatch.setattr(module, "RENEWAL", 0.2)
    BucketDirectory(url).write(LOCK_FILE, json.dumps(DEAD).encode())
    count, barrier, ended = 8, threading.Barrier(8), threading.Semaphore(0)
    got, refused = [], []

    def wait() -> None:
        bucket = BucketDirectory(url)
        barrier.wait()
        try:
            with hold_lease(bucket, patience=2.0) as lease:
                for _ in range(count - 1):
                    assert ended.acquire(timeout=60)
                check_lease(bucket, lease)
                got.append(lease)
        except UserError as error:
            refused.append(error)
        ended.release()

    threads = [threading.Thread(target=wait) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused)) == (1, count - 1)
    assert not [error for error in refused if isinstance(error, TryAgainError)]


def test_a_renewal_that_arrives_after_a_takeover_changes_nothing(
    s3: str, s3_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Because the writer or the network was suspended."""
    monkeypatch.setattr(module, "RENEWAL", 0.1)
    monkeypatch.setattr(module, "is_dead", lambda owner: False)
    under_way, arrives, sleeps = threading.Event(), threading.Event(), threading.Event()

    def faults(method: str, path: str, number: int) -> Fault:
        if sleeps.is_set() and method == "PUT":
            under_way.set()
            assert arrives.wait(60)
        return Fault()

    with FaultyLink(s3_port, faults) as link:
        point_at(link.port, monkeypatch)
        first = BucketDirectory(s3)
        with hold_lease(first) as lease:
            sleeps.set()
            assert under_way.wait(60)
            point_at(s3_port, monkeypatch)
            second = BucketDirectory(s3)
            monkeypatch.setattr(module, "RENEWAL", 60.0)
            with hold_lease(second, patience=0.5) as other:
                arrives.set()
                time.sleep(0.5)
                check_lease(second, other)
                with pytest.raises(TryAgainError):
                    check_lease(first, lease)
        assert lease_owner(second) is None


@pytest.mark.parametrize(
    "before", [None, module._RELEASED, json.dumps(DEAD).encode()], ids=["none", "released", "dead"]
)
@pytest.mark.parametrize("scheme", ["s3", "gcs"])
def test_a_writer_recognizes_its_lock_after_a_lost_response(
    scheme: str, before: bytes | None, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server wrote the lock, and reports a conflict at the next attempt. The same happens to renewals and releases."""
    url: str = request.getfixturevalue(scheme)
    monkeypatch.setattr(module, "RENEWAL", 0.2)
    lost: list[int] = []

    def faults(method: str, path: str, number: int) -> Fault:
        is_lock = LOCK_FILE in path and method == ("PUT" if scheme == "s3" else "POST")
        lost.extend([number] if is_lock else [])
        return Fault(status=503 if is_lock and len(lost) % 2 else 0)

    if before is not None:
        BucketDirectory(url).write(LOCK_FILE, before)
    with FaultyLink(request.getfixturevalue(f"{scheme}_port"), faults) as link:
        (point_at if scheme == "s3" else point_at_gcs)(link.port, monkeypatch)
        bucket = BucketDirectory(url)
        with hold_lease(bucket, patience=0.1) as lease:
            check_lease(bucket, lease)
            wait_for(lambda: lock_of(bucket)["renewals"])
            check_lease(bucket, lease)
        assert lease_owner(bucket) is None
    assert len(lost) > 6


class Unconditional(FaultyLink):
    """Connection to a private S3 server that does not support preconditions."""

    def answer(self, handler: http.server.BaseHTTPRequestHandler, sent: bytes | None) -> Answer:
        for name in ("If-Match", "If-None-Match"):
            del handler.headers[name]
        return super().answer(handler, sent)


def test_a_server_that_ignores_preconditions_is_refused(
    s3: str, s3_port: int, gcs: str, gcs_server_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Unconditional(s3_port, lambda *_: Fault()) as link:
        point_at(link.port, monkeypatch)
        point_at_gcs(gcs_server_port, monkeypatch)
        for url in (s3, gcs):
            bucket = BucketDirectory(url)
            with (
                pytest.raises(UserError, match=f"{url}.*If-None-Match") as caught,
                hold_lease(bucket),
            ):
                pass
            assert caught.value.exit_code == 2
            assert lease_owner(bucket) is None


def test_a_server_that_refuses_preconditions_is_refused(
    s3: str, s3_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultyLink(s3_port, lambda m, p, n: Fault(status=501 if m == "PUT" else 0)) as link:
        point_at(link.port, monkeypatch)
        with (
            pytest.raises(UserError, match=f"{s3}.*If-None-Match") as caught,
            hold_lease(BucketDirectory(s3)),
        ):
            pass
        assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "content",
    [
        b"\xff",
        b"[" * 10_000,
        b"{}",
        b'{"pid": "1", "machine": []}',
        b'{"lease": "x", "host": "\\u001b[2J\\n"}',
    ],
    ids=lambda content: str(content[:12]),
)
def test_a_damaged_lock_is_watched_and_taken_over(
    bucket: BucketDirectory, capfd: pytest.CaptureFixture[str], content: bytes
) -> None:
    bucket.write(LOCK_FILE, content)
    with hold_lease(bucket, patience=0.1) as lease:
        check_lease(bucket, lease)
    out = capfd.readouterr().out
    assert "another process" in out
    assert "\x1b" not in out


def test_an_oversized_lock_is_refused(bucket: BucketDirectory) -> None:
    bucket.write(LOCK_FILE, b" " * (1 << 17))
    with pytest.raises(DataError, match=r"/\.lock"), hold_lease(bucket, patience=0.1):
        pass
