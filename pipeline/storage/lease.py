"""Exclusive lock of a store in a bucket: an object that its owner keeps renewing, since no kernel watches over it.

The lock changes hands only by conditional writes: it is created, renewed, taken over and released over the version that the
writer has read. Of several runs that find a dead owner, one takes over the lock; a later renewal by the old owner changes
nothing. A released lock remains as an object that says so, since few servers support conditional removals.

A lock is taken over at once if its owner is a process of this machine that has ended. Other locks are watched: a lock that is not
renewed for `PATIENCE` seconds has no owner any more. The clocks of two machines are never compared.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import DataError, TryAgainError, UserError
from pipeline.storage.bucket import BucketDirectory
from pipeline.storage.conditional import unsupported
from pipeline.storage.lock import LOCK_FILE, LOCK_LIMIT, Owner, owner_text, read_owner, this_process
from pipeline.storage.retry import with_retries

RENEWAL, PATIENCE = 20.0, 90.0  # seconds; three renewals may fail
_POLL = 2.0  # seconds
_RELEASED = b'{"released": true}'


def machine_of_processes() -> str:
    """Identifies the machine, or container, in which process numbers are valid: its boot and its process namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    started = boot.read_text().strip() if boot.exists() else socket.gethostname()
    return f"{started} {Path('/proc/self/ns/pid').stat().st_ino}"


def _read(bucket: BucketDirectory) -> tuple[Owner | None, str | None]:
    """The owner, None if the lock is free, and the version of the lock object, None if there is none."""
    try:
        data, version = bucket.read_version(LOCK_FILE, limit=LOCK_LIMIT)
    except FileNotFoundError:
        return None, None
    except ValueError as error:
        raise DataError(
            f"{bucket.place(LOCK_FILE)}: not a lock ({error}); if no run is writing the store, remove it"
        ) from error
    if data == _RELEASED:
        return None, version
    return read_owner(data.decode(errors="replace")), version


def lease_owner(bucket: BucketDirectory) -> Owner | None:
    """The owner of the lock, which may have been killed; None if the lock is free.

    If two calls more than `PATIENCE` seconds apart return the same owner, it is dead.
    """
    return _read(bucket)[0]


def is_dead(owner: Owner) -> bool:
    """Whether the owner is known to have ended: no process of this machine has its number, or this process has it."""
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
    """Checks that this run still holds the lock. Workers call it before they write.

    Raises:
      TryAgainError: another run has taken over the lock.
    """
    if (found := lease_owner(bucket)) is None or found.get("lease") != lease:
        raise TryAgainError(
            f"--store={bucket.url}: another run has taken over the store, because this run did not renew its lock for "
            f"{PATIENCE:.0f} s; wait for the other run, then rerun the same command (published data is safe)"
        )


@contextlib.contextmanager
def hold_lease(bucket: BucketDirectory, *, patience: float = PATIENCE) -> Iterator[str]:
    """Holds the lock of a store in a bucket. Yields the lease, by which workers recognize the lock.

    Args:
      bucket: directory of the store.
      patience: seconds without a renewal after which an owner counts as dead.

    Raises:
      UserError: another process holds the lock; the message names it. Or the server ignores preconditions.
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
        # If the connection is down, the lock remains and the next run notices that it is not renewed. The error to report is the
        # one that ended the work.
        with contextlib.suppress(UserError, DataError):
            lock.write(_RELEASED)


class _HeldLock:
    """The lock object while this process owns it.

    Args:
      bucket: directory of the store.
      owner: content of the lock, without the number of renewals.
      version: version of the lock object.
    """

    def __init__(self, bucket: BucketDirectory, owner: Owner, version: str) -> None:
        self._bucket, self._owner, self._version = bucket, owner, version
        self.lease: str = owner["lease"]

    def write(self, data: bytes) -> bool:
        """Replaces the lock if it still belongs to this owner; returns whether it did."""
        for _ in range(2):
            try:
                self._version = self._bucket.replace(LOCK_FILE, data, version=self._version)
            except FileExistsError:
                found, version = _read(self._bucket)
                if found is None or version is None or found.get("lease") != self.lease:
                    return False
                self._version = version  # written by an earlier renewal that seemed to fail
            else:
                return True
        return False

    def keep_renewing(self, ended: threading.Event) -> None:
        """Renews the lock periodically until `ended` is set or another run has taken over the lock."""
        renewals = 0
        while not ended.wait(RENEWAL):
            renewals += 1
            # Workers check the lock before they write. After any error, a later renewal may succeed.
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
        "lease": secrets.token_hex(8),  # identifies an attempt whose response was lost as this run's own
        "machine": machine_of_processes(),
        **this_process(),
    }
    while True:
        dead, free = _wait_for_owner(bucket, patience=patience)
        try:
            version = bucket.replace(LOCK_FILE, _text(owner, 0), version=free)
        except FileExistsError as error:
            if (
                found := lease_owner(bucket)
            ) is None:  # another run has taken and released it in the meantime
                continue
            raise _held(bucket, found) from error
        break
    if dead is not None:
        print(
            f"--store={bucket.url}: took over the lock; its owner has ended: {owner_text(dead)}", flush=True
        )
    lock = _HeldLock(bucket, owner, version)
    if not _honors_preconditions(bucket, owner):
        lock.write(_RELEASED)
        raise UserError(unsupported(bucket.url))
    return lock


def _honors_preconditions(bucket: BucketDirectory, owner: Owner) -> bool:
    """Whether the server refuses to write the existing lock under the condition that it is absent, or has another version.

    Private S3 servers may ignore the conditions, and so do old versions of botocore.
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
    """Waits until the lock is free or its owner has ended.

    Returns:
      The dead owner, None if the lock was free, and the version to replace, None if there is no lock object.

    Raises:
      UserError: the owner lives.
    """
    first, version = _read(bucket)
    if first is None or is_dead(first):
        return first, version
    print(
        f"--store={bucket.url}: locked by {owner_text(first)}; checking for {patience:.0f} s whether it is alive",
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
    return UserError(
        f"--store={bucket.url}: locked by {owner_text(owner)}; wait for it to finish, or end it on that host"
    )
