"""One writer a store: a lock that survives nothing but its owner."""

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
LOCK_LIMIT = 1 << 16  # of a lock's text
_ATTEMPTS, _PAUSE = 5, 0.05  # a reader that looks whether the lock is held holds it for microseconds


def is_locked(directory: Path) -> bool:
    """Whether a process holds the lock of a store.

    Raises:
      UserError: the lock cannot be read, or the file system has no locks.
    """
    path = directory / LOCK_FILE
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError as error:
        raise UserError(
            f"{path}: cannot be asked for its owner ({error.strerror}); use a file system with locks"
        ) from error
    return False


def _lock(descriptor: int) -> None:
    for attempt in range(_ATTEMPTS):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if attempt + 1 == _ATTEMPTS:
                raise
            time.sleep(_PAUSE)
        else:
            return


class Owner(TypedDict, total=False):
    """What a lock says of its owner; of one that cannot be read, nothing."""

    pid: Positive
    host: str
    since: str
    command: str
    # Of a lock in a bucket.
    lease: str
    machine: str
    renewals: int


def read_owner(text: str) -> Owner:
    """The owner that a lock's text names; an empty one where it is damaged, which is a lock all the same."""
    try:
        return build(Owner, parse_json(text))
    except ValueError:
        return Owner()


def owner_text(owner: Owner) -> str:
    """The owner, for people."""
    if not {"pid", "host", "since"} <= owner.keys():
        return "another process"
    return printable(f"process {owner['pid']} on {owner['host']:.200} since {owner['since']:.50}")


@contextlib.contextmanager
def writer_lock(directory: Path, *, flag: str = "--store") -> Iterator[None]:
    """Holds the lock of a store, or of another directory that `flag` names.

    The kernel releases it when the owner ends, however it ends, so there is no stale lock to clean up.

    Raises:
      UserError: somebody else holds it; says who, since when, and how to break it. Or the directory cannot be
        written, or its file system has no locks.
    """
    with _locked_file(directory, flag) as file:
        file.truncate(0)
        owner = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": " ".join(sys.argv),
        }
        file.write(json.dumps(owner))
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def _locked_file(directory: Path, flag: str) -> IO[str]:
    """The lock's file, open and locked, and still the one at its path."""
    path = directory / LOCK_FILE
    while True:
        try:
            # A link would have another file emptied.
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise UserError(
                f"{flag}={directory}: cannot be written ({error.strerror}: {path}); {remedy(error.errno)}"
            ) from error
        with contextlib.ExitStack() as refused:
            file = refused.enter_context(os.fdopen(descriptor, "a+", errors="replace"))
            try:
                _lock(file.fileno())
            except BlockingIOError as error:
                raise _held(file, path, f"{flag}={directory}") from error
            except OSError as error:
                raise UserError(
                    f"{flag}={directory}: its file system has no locks ({error.strerror}), which keep two runs from writing "
                    "it at once; mount it with locks, or name a directory on another"
                ) from error
            if _is_at(path, file):
                refused.pop_all()
                return file
            # Removed or replaced between the two calls: this lock would keep no other writer out.


def _is_at(path: Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(path.stat(follow_symlinks=False), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _held(file: IO[str], path: Path, place: str) -> UserError:
    """Who holds a lock, by what is in its file, and what to do."""
    file.seek(0)
    owner = read_owner(file.read(LOCK_LIMIT))
    how = f"`kill {owner['pid']}` there" if "pid" in owner else f"end it (`fuser {path}` names it)"
    return UserError(f"{place}: {owner_text(owner)} is writing it; wait for it, or break the lock: {how}")
