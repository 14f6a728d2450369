"""One writer a store: a lock that survives nothing but its owner."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import UserError, remedy

LOCK_FILE = ".lock"


@contextlib.contextmanager
def writer_lock(directory: Path, *, flag: str = "--store") -> Iterator[None]:
    """Holds the lock of a store, or of another directory that `flag` names.

    The kernel releases it when the owner ends, however it ends, so there is no stale lock to clean up.

    Raises:
      UserError: somebody else holds it; says who, since when, and how to break it. Or the directory cannot be
        written.
    """
    path = directory / LOCK_FILE
    try:
        # A link would have another file emptied.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise UserError(
            f"{flag}={directory}: cannot be written ({error.strerror}: {path}); {remedy(error.errno)}"
        ) from error
    with os.fdopen(descriptor, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            try:
                owner = json.loads(file.read())
                whose = f"process {owner['pid']} on {owner['host']} since {owner['since']}"
                how = f"`kill {owner['pid']}` there"
            except (ValueError, KeyError, TypeError, RecursionError):
                whose, how = "another process", f"end it (`fuser {path}` names it)"
            raise UserError(
                f"{flag}={directory}: {whose} is writing it; wait for it, or break the lock: {how}"
            ) from error
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
