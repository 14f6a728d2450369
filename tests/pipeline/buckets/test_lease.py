"""pipeline.buckets.lease: one writer a store in a bucket, with writers that are really killed."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time

import pytest

from pipeline.buckets import lease as module
from pipeline.buckets.directory import BucketDirectory
from pipeline.buckets.lease import check_lease, hold_lease
from pipeline.errors import DataError, TryAgainError, UserError

HOLD = """
import sys, time
from pipeline.buckets.directory import BucketDirectory
from pipeline.buckets.lease import hold_lease
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


def test_the_lock_is_there_while_it_is_held_and_gone_after(bucket: BucketDirectory) -> None:
    with hold_lease(bucket) as lease:
        assert lock_of(bucket)["lease"] == lease
        check_lease(bucket, lease)
    assert bucket.objects() == {}
    with pytest.raises(TryAgainError, match="another run has taken the store over"):
        check_lease(bucket, lease)


def test_a_killed_owner_of_this_machine_is_known_to_be_dead_at_once(
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
    assert f"the lock of process {process.pid} on " in capfd.readouterr().out


def test_a_living_owner_is_named(bucket: BucketDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RENEWAL", 0.2)
    with hold_lease(bucket):
        monkeypatch.setattr(module, "_is_dead", lambda owner: False)  # it is this very process
        with (
            pytest.raises(UserError, match=r"process \d+ on .* since .* is writing it; wait for it"),
            hold_lease(bucket, patience=30),
        ):
            pass


def test_a_lock_that_nobody_renews_is_broken(bucket: BucketDirectory) -> None:
    owner = {"lease": "ab", "pid": 1, "machine": "another", "host": "far", "since": "then", "renewals": 3}
    bucket.write(".lock", json.dumps(owner).encode())
    with hold_lease(bucket, patience=0.5) as lease:
        assert lock_of(bucket)["lease"] == lease


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff"])
def test_a_lock_that_says_nothing_is_broken_after_a_while(bucket: BucketDirectory, content: bytes) -> None:
    bucket.write(".lock", content)
    with hold_lease(bucket, patience=0.2):
        pass


def test_who_lost_the_lock_finds_out_and_leaves_the_new_one(
    bucket: BucketDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RENEWAL", 0.1)
    with hold_lease(bucket) as lease:
        bucket.write(".lock", json.dumps({"lease": "another"}).encode())
        time.sleep(0.5)
        with pytest.raises(TryAgainError, match="another run has taken the store over"):
            check_lease(bucket, lease)
    assert lock_of(bucket) == {"lease": "another"}


def test_what_ended_the_work_is_told_though_the_link_is_down(
    bucket: BucketDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def down(_: BucketDirectory) -> None:
        raise TryAgainError("the link is down")

    with monkeypatch.context() as patch:

        def work() -> None:
            with hold_lease(bucket):
                patch.setattr(module, "_read", down)
                raise KeyError("the work")

        with pytest.raises(KeyError, match="the work"):
            work()
    with hold_lease(bucket):  # its owner is no more
        pass


def test_a_renewal_that_fails_is_not_the_last(
    bucket: BucketDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RENEWAL", 0.05)
    read, failures = module._read, [DataError("other bytes came"), RuntimeError("whatever")]

    def fail(bucket: BucketDirectory) -> dict[str, object] | None:
        if failures:
            raise failures.pop()
        return read(bucket)

    with hold_lease(bucket):
        monkeypatch.setattr(module, "_read", fail)
        end = time.monotonic() + 20
        while not lock_of(bucket)["renewals"] and time.monotonic() < end:
            time.sleep(0.05)
        assert lock_of(bucket)["renewals"]


def test_of_writers_that_begin_together_one_gets_it(
    bucket: BucketDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_is_dead", lambda owner: False)
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
