"""One writer per store in a bucket: a lock object that its owner keeps renewing, since no kernel watches over it.

The lock changes hands by conditional writes alone: it is created, renewed, taken over and released only over the version
that the writer has seen. Of several runs that find a dead owner, one takes the lock over; a renewal that arrives after
that changes nothing. A released lock stays as an object that says so, since few servers have conditional removals.

A lock whose owner is a process of this machine that has ended is taken over at once. Another is watched: one that is
not renewed for `PATIENCE` seconds has no owner any more. No two machines' clocks are compared.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import DataError, TryAgainError, UserError
from pipeline.storage.bucket import BucketDirectory
from pipeline.storage.conditional import unsupported
from pipeline.storage.lock import LOCK_FILE, LOCK_LIMIT, Owner, owner_text, read_owner
from pipeline.storage.retry import with_retries

RENEWAL, PATIENCE = 20.0, 90.0  # seconds; a renewal may be late by three of them
_POLL = 2.0
_RELEASED = b'{"released": true}'


def machine_of_processes() -> str:
    """What this machine's process numbers are numbers in: its boot, and the container's namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    started = boot.read_text().strip() if boot.exists() else socket.gethostname()
    return f"{started} {Path('/proc/self/ns/pid').stat().st_ino}"


def _read(bucket: BucketDirectory) -> tuple[Owner | None, str | None]:
    """The lock's owner, None where it is free, and its version, None where there is no lock object."""
    try:
        data, version = bucket.read_version(LOCK_FILE, limit=LOCK_LIMIT)
    except FileNotFoundError:
        return None, None
    except ValueError as error:
        raise DataError(
            f"{bucket.place(LOCK_FILE)}: not a lock ({error}); remove it if no run is writing the store"
        ) from error
    if data == _RELEASED:
        return None, version
    return read_owner(data.decode(errors="replace")), version


def lease_owner(bucket: BucketDirectory) -> Owner | None:
    """What the lock says of its owner, who may have ended without a word; None where the lock is free.

    Two calls more than `PATIENCE` seconds apart that return the same have found a dead owner.
    """
    return _read(bucket)[0]


def is_dead(owner: Owner) -> bool:
    """Whether the owner is known to have ended: a process number of this very machine that nobody has, or that is ours."""
    if owner.get("machine") != machine_of_processes() or "pid" not in owner:
        return False
    if owner["pid"] == os.getpid():
        return True
    try:
        os.kill(owner["pid"], 0)  # /proc may hide the processes of other users
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        pass
    return False


def check_lease(bucket: BucketDirectory, lease: str) -> None:
    """Whether the lock is still the one that was taken; for workers, before they write.

    Raises:
      TryAgainError: another run has taken it over.
    """
    if (found := lease_owner(bucket)) is None or found.get("lease") != lease:
        raise TryAgainError(
            f"--store={bucket.url}: another run has taken the store over, for this one's lock was not renewed for "
            f"{PATIENCE:.0f} s; wait for it, then run the same command again: what it published is kept"
        )


@contextlib.contextmanager
def hold_lease(bucket: BucketDirectory, *, patience: float = PATIENCE) -> Iterator[str]:
    """Holds the lock of a store in a bucket; gives the text by which its workers know it.

    Raises:
      UserError: somebody else holds it; says who and since when. Or the server ignores preconditions.
    """
    lock = _take(bucket, patience=patience)
    ended = threading.Event()
    thread = threading.Thread(target=lock.keep_renewing, args=(ended,), daemon=True)
    thread.start()
    try:
        yield lock.lease
    finally:
        ended.set()
        thread.join()
        # Where the link is down the lock stays, and the next run sees that it is not renewed. The error that ended the
        # work is the one to report.
        with contextlib.suppress(UserError, DataError):
            lock.write(_RELEASED)


class _HeldLock:
    """The lock object while this process owns it.

    Args:
      bucket: of the store.
      owner: the lock's content but its count of renewals.
      version: that is there.
    """

    def __init__(self, bucket: BucketDirectory, owner: Owner, version: str) -> None:
        self._bucket, self._owner, self._version = bucket, owner, version
        self.lease: str = owner["lease"]

    def write(self, data: bytes) -> bool:
        """Replaces the lock if it is still this owner's; whether it was."""
        for _ in range(2):
            try:
                self._version = self._bucket.replace(LOCK_FILE, data, version=self._version)
            except FileExistsError:
                found, version = _read(self._bucket)
                if found is None or version is None or found.get("lease") != self.lease:
                    return False
                self._version = version  # of an earlier renewal, which was thought to have failed
            else:
                return True
        return False

    def keep_renewing(self, ended: threading.Event) -> None:
        """Renews the lock from time to time, until another run has taken it over."""
        renewals = 0
        while not ended.wait(RENEWAL):
            renewals += 1
            # The link is down: workers find out before they write. Whatever it is, a later renewal may succeed.
            with contextlib.suppress(Exception):
                if not self.write(_text(self._owner, renewals)):
                    return


def _text(owner: Owner, renewals: int) -> bytes:
    return json.dumps({**owner, "renewals": renewals}).encode()


def _take(bucket: BucketDirectory, *, patience: float) -> _HeldLock:
    """Creates the lock, or replaces one that is free or whose owner has ended.

    Raises:
      UserError: its owner lives, another run was faster, or the server ignores preconditions.
    """
    owner: Owner = {
        "lease": secrets.token_hex(8),  # by which an attempt whose answer was lost is known to be ours
        "pid": os.getpid(),
        "machine": machine_of_processes(),
        "host": socket.gethostname(),
        "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
    }
    while True:
        dead, free = _wait_for_owner(bucket, patience=patience)
        try:
            version = bucket.replace(LOCK_FILE, _text(owner, 0), version=free)
        except FileExistsError as error:
            if (found := lease_owner(bucket)) is None:  # another run has taken and released it meanwhile
                continue
            raise _held(bucket, found) from error
        break
    if dead is not None:
        print(
            f"--store={bucket.url}: the lock of {owner_text(dead)} has no owner any more: taken over",
            flush=True,
        )
    lock = _HeldLock(bucket, owner, version)
    if not _honors_preconditions(bucket, owner):
        lock.write(_RELEASED)
        raise UserError(unsupported(bucket.url))
    return lock


def _honors_preconditions(bucket: BucketDirectory, owner: Owner) -> bool:
    """Whether the server refuses to write the lock, which is there, as absent and as of another version.

    Private S3 servers may ignore the conditions, and so does a botocore older than them.
    """
    place, text = bucket.place(LOCK_FILE), _text(owner, 0)
    for version in (None, "1"):
        put = functools.partial(bucket.conditional.put, place, text, version=version)
        try:
            with_retries(f"{place}: cannot be written", put)
        except FileExistsError:
            continue
        return False
    return True


def _wait_for_owner(bucket: BucketDirectory, *, patience: float) -> tuple[Owner | None, str | None]:
    """Returns when the lock is free or its owner has ended: the dead owner, if any, and the version to be replaced.

    Raises:
      UserError: its owner lives.
    """
    first, version = _read(bucket)
    if first is None or is_dead(first):
        return first, version
    print(
        f"--store={bucket.url}: locked by {owner_text(first)}; watching for {patience:.0f} s whether it lives",
        flush=True,
    )
    end = time.monotonic() + patience
    while time.monotonic() < end:
        time.sleep(min(_POLL, patience / 10))
        found, now = _read(bucket)
        if found is None:
            return None, now
        if now != version:
            raise _held(bucket, found)
    return first, version


def _held(bucket: BucketDirectory, owner: Owner) -> UserError:
    return UserError(f"--store={bucket.url}: {owner_text(owner)} is writing it; wait for it, or end it there")
