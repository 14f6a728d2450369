"""One writer a store in a bucket: a lock object that its owner keeps renewing, for no kernel watches over it.

A lock whose owner is a process of this machine that has ended is broken at once. Another is watched: one that is
not renewed for `PATIENCE` seconds has no owner any more. No two machines' clocks are compared.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.buckets.directory import BucketDirectory
from pipeline.errors import DataError, TryAgainError, UserError
from pipeline.store.lock import LOCK_FILE
from pipeline.store.untrusted import parse_json

RENEWAL, PATIENCE = 20.0, 90.0  # seconds; a renewal may be late by three of them
_POLL = 2.0
_LIMIT = 1 << 16


def machine_of_processes() -> str:
    """What this machine's process numbers are numbers in: its boot, and the container's namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    started = boot.read_text().strip() if boot.exists() else socket.gethostname()
    return f"{started} {Path('/proc/self/ns/pid').stat().st_ino}"


def _read(bucket: BucketDirectory) -> dict[str, Any] | None:
    """The lock that is there, or None."""
    try:
        found = parse_json(bucket.read(LOCK_FILE, limit=_LIMIT).decode())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _is_dead(owner: dict[str, Any]) -> bool:
    """Whether the owner is known to have ended: a process number of this very machine that nobody has, or that is ours."""
    if owner.get("machine") != machine_of_processes() or type(owner.get("pid")) is not int:
        return False
    return owner["pid"] == os.getpid() or not Path(f"/proc/{owner['pid']}").exists()


def check_lease(bucket: BucketDirectory, lease: str) -> None:
    """Whether the lock is still the one that was taken; for workers, before they write.

    Raises:
      TryAgainError: another run has taken it over.
    """
    if (found := _read(bucket)) is None or found.get("lease") != lease:
        raise TryAgainError(
            f"--store={bucket.url}: another run has taken the store over, for this one's lock was not renewed for "
            f"{PATIENCE:.0f} s; wait for it, then run the same command again: what it published is kept"
        )


@contextlib.contextmanager
def hold_lease(bucket: BucketDirectory, *, patience: float = PATIENCE) -> Iterator[str]:
    """Holds the lock of a store in a bucket; gives the text by which its workers know it.

    Raises:
      UserError: somebody else holds it; says who and since when.
    """
    _wait_for_owner(bucket, patience=patience)
    lease = secrets.token_hex(8)
    owner = {
        "lease": lease,
        "pid": os.getpid(),
        "machine": machine_of_processes(),
        "host": socket.gethostname(),
        "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
    }
    try:
        bucket.write(LOCK_FILE, _text(owner, 0), create=True)
    except FileExistsError as error:
        found = _read(bucket) or {}
        if found.get("lease") != lease:  # else ours, put there by an attempt whose answer was lost
            raise _held(bucket, found) from error
    ended = threading.Event()
    thread = threading.Thread(target=_renew, args=(bucket, owner, ended), daemon=True)
    thread.start()
    try:
        yield lease
    finally:
        ended.set()
        thread.join()
        # Where the link is down the lock stays, and whoever comes next sees that nobody renews it: what ended the work
        # is what is told.
        with contextlib.suppress(UserError, DataError):
            if (_read(bucket) or {}).get("lease") == lease:
                bucket.remove(LOCK_FILE)


def _text(owner: dict[str, Any], renewals: int) -> bytes:
    return json.dumps({**owner, "renewals": renewals}).encode()


def _renew(bucket: BucketDirectory, owner: dict[str, Any], ended: threading.Event) -> None:
    """Says from time to time that the owner lives, unless somebody thought otherwise in the meantime."""
    renewals = 0
    while not ended.wait(RENEWAL):
        # The link is down: workers find out before they write. Whatever it is, a later renewal may succeed.
        with contextlib.suppress(Exception):
            if (_read(bucket) or {}).get("lease") != owner["lease"]:
                return
            renewals += 1
            bucket.write(LOCK_FILE, _text(owner, renewals))


def _wait_for_owner(bucket: BucketDirectory, *, patience: float) -> None:
    """Returns when there is no lock, breaking one without an owner.

    Raises:
      UserError: its owner lives.
    """
    if (first := _read(bucket)) is None:
        return
    if not _is_dead(first):
        print(
            f"--store={bucket.url}: locked by {_whose(first)}; watching for {patience:.0f} s whether it lives",
            flush=True,
        )
        end = time.monotonic() + patience
        while time.monotonic() < end:
            time.sleep(min(_POLL, patience / 10))
            if (found := _read(bucket)) is None:
                return
            if found != first:
                raise _held(bucket, found)
    print(f"--store={bucket.url}: the lock of {_whose(first)} has no owner any more: broken", flush=True)
    bucket.remove(LOCK_FILE)


def _whose(owner: dict[str, Any]) -> str:
    if not {"pid", "host", "since"} <= owner.keys():
        return "another process"
    return f"process {owner['pid']} on {owner['host']} since {owner['since']}"


def _held(bucket: BucketDirectory, owner: dict[str, Any]) -> UserError:
    return UserError(f"--store={bucket.url}: {_whose(owner)} is writing it; wait for it, or end it there")
