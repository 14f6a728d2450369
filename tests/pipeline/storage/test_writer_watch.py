"""pipeline.storage.writer_watch: whether a store's writer is alive, on a disk and in a bucket."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline.storage.bucket import BucketDirectory
from pipeline.storage.lease import hold_lease
from pipeline.storage.lock import LOCK_FILE, writer_lock
from pipeline.storage.writer_watch import WriterWatch

HOLD = "import sys, time; from pathlib import Path; from pipeline.storage.lock import writer_lock\n"
HOLD += "with writer_lock(Path(sys.argv[1])): print(flush=True); time.sleep(100)"


def test_a_lock_on_a_disk_is_seen_until_its_owner_is_killed(tmp_path: Path) -> None:
    watch = WriterWatch(str(tmp_path))
    assert not watch.is_written()  # no lock file
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        owner.stdout.readline()
        assert watch.is_written()
        owner.kill()
        owner.wait()
        assert not watch.is_written()  # the file remains, and names the dead owner
    assert (tmp_path / LOCK_FILE).read_text()


def test_readers_do_not_keep_a_writer_out(tmp_path: Path) -> None:
    ended = threading.Event()

    def look() -> None:
        watch = WriterWatch(str(tmp_path))
        while not ended.wait(0.001):  # a thousand times as often as a reader that follows a store
            watch.is_written()

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(100):
            with writer_lock(tmp_path):
                pass
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def test_a_lock_in_a_bucket_is_seen_while_it_is_renewed(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.storage.lease.RENEWAL", 0.2)
    bucket, watch = BucketDirectory(s3), WriterWatch(s3, patience=1.0)
    assert not watch.is_written()
    with hold_lease(bucket):
        # This process would count as dead at once.
        monkeypatch.setattr("pipeline.storage.writer_watch.is_dead", lambda owner: False)
        for _ in range(15):
            assert watch.is_written()
            time.sleep(0.1)
        monkeypatch.undo()
    assert not watch.is_written()


def test_an_owner_on_another_host_that_does_not_renew_is_gone(s3: str) -> None:
    bucket, watch = BucketDirectory(s3), WriterWatch(s3, patience=0.5)
    bucket.write(LOCK_FILE, json.dumps({"pid": 1, "host": "elsewhere", "machine": "another"}).encode())
    assert watch.is_written()
    time.sleep(0.6)
    assert not watch.is_written()
