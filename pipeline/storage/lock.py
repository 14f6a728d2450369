"""Exclusive lock of a directory that one process writes. The kernel releases it when its owner ends.

The library filelock does not fit: its file locks are exclusive only (its shared locks are SQLite databases), while readers here take a
shared lock to look without keeping a writer out. Where flock is missing, it falls back to a file that outlives its owner by default.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TypedDict

from pipeline.errors import UserError
from pipeline.errors.causes import remedy
from pipeline.errors.text import printable
from pipeline.storage.checked_json import Positive, build, parse_json

LOCK_FILE = ".lock"
LOCK_LIMIT = 1 << 16  # largest size of a lock's text in bytes
_ATTEMPTS, _PAUSE = (
    20,
    0.05,
)  # a reader holds the lock while it looks: microseconds, milliseconds on a loaded machine


class LockedError(UserError):
    """Another process holds the lock."""


def flock(file: IO[str] | IO[bytes] | int, *, shared: bool = False, wait: bool = True) -> bool:
    """Locks an open file, or changes the kind of its lock. Closing the file, or the end of the process, releases it.

    Args:
      file: open file or its descriptor.
      shared: whether other processes may hold a shared lock at the same time.
      wait: whether to wait for other processes.

    Returns:
      True if the file is locked; False if another process holds it, and `wait` is False.

    Raises:
      OSError: the file system has no locks.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(file, kind if wait else kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_locked(directory: Path) -> bool:
    """Whether a process holds the lock of a directory.

    Raises:
      UserError: the lock cannot be read, or the file system has no locks.
    """
    path = directory / LOCK_FILE
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            return not flock(descriptor, shared=True, wait=False)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise UserError(
            f"{path}: cannot check the lock ({error.strerror}); use a file system with locks"
        ) from error


class Owner(TypedDict, total=False):
    """The owner as recorded in a lock; empty if the lock is damaged."""

    pid: Positive
    host: str
    since: str
    command: str
    # Only in a bucket.
    lease: str
    machine: str
    renewals: int


def this_process() -> Owner:
    """This process as the owner of a lock."""
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
    }


def read_owner(text: str) -> Owner:
    """The owner in a lock's text; empty if the text is damaged, which does not make the lock invalid."""
    try:
        return build(Owner, parse_json(text))
    except ValueError:
        return Owner()


def owner_text(owner: Owner) -> str:
    """The owner as messages name it."""
    if not {"pid", "host", "since"} <= owner.keys():
        return "another process"
    return printable(f"process {owner['pid']} on {owner['host']:.200} since {owner['since']:.50}")


@contextlib.contextmanager
def writer_lock(directory: Path, *, flag: str = "--store") -> Iterator[None]:
    """Holds the exclusive lock of a directory.

    The kernel releases the lock when the process ends, however it ends, so there are no stale locks.

    Args:
      directory: existing directory.
      flag: flag that names it, for errors.

    Raises:
      LockedError: another process holds the lock; the message names the process, its host and how to break the lock.
      UserError: the directory cannot be written, or its file system has no locks.
    """
    with _locked_file(directory, flag) as file:
        file.truncate(0)
        file.write(json.dumps(this_process()))
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def _locked_file(directory: Path, flag: str) -> IO[str]:
    """The lock file, open and locked, and verified to be still the one at its path."""
    path = directory / LOCK_FILE
    while True:
        try:
            # O_NOFOLLOW: through a link, another file would be emptied.
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise UserError(
                f"{flag}={directory}: cannot be written ({error.strerror}: {path}); {remedy(error.errno)}"
            ) from error
        with contextlib.ExitStack() as refused:
            file = refused.enter_context(os.fdopen(descriptor, "a+", errors="replace"))
            try:
                if not _locked_soon(file):
                    raise _held(file, path, f"{flag}={directory}")
            except OSError as error:
                raise UserError(
                    f"{flag}={directory}: the file system has no locks ({error.strerror}), so two runs could write the directory "
                    "at once; mount it with locks, or use a directory on another file system"
                ) from error
            if _is_at(path, file):
                refused.pop_all()
                return file
            # The file was removed or replaced between the two calls, so this lock would not keep other writers out.


def _locked_soon(file: IO[str]) -> bool:
    """Takes an exclusive lock, in several attempts; False if another process holds it."""
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_PAUSE)
        if flock(file, wait=False):
            return True
    return False


def _is_at(path: Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(path.stat(follow_symlinks=False), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _held(file: IO[str], path: Path, place: str) -> LockedError:
    """The error that names the holder of a lock, as recorded in its file."""
    file.seek(0)
    owner = read_owner(file.read(LOCK_LIMIT))
    how = f"run `kill {owner['pid']}` on that host" if "pid" in owner else f"end it (`fuser {path}` shows it)"
    return LockedError(f"{place}: locked by {owner_text(owner)}; wait for it to finish, or {how}")
