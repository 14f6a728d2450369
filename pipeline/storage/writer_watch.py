"""Detects whether a store is being written, for readers that wait for more published data."""

from __future__ import annotations

import time
from pathlib import Path

from pipeline.storage.bucket import BucketDirectory, is_url
from pipeline.storage.lease import PATIENCE, is_dead, lease_owner
from pipeline.storage.lock import is_locked


class WriterWatch:
    """Watches the lock of a store.

    On a file system, the kernel knows whether the owner is alive, also on other hosts that share the file system. In a bucket, the
    owner renews the lock. An owner that ended on this machine is noticed at once, others after `patience` seconds.

    Args:
      location: path or URL of the store.
      patience: seconds without a renewal after which an owner counts as dead.
    """

    def __init__(self, location: str, *, patience: float = PATIENCE) -> None:
        self._path = Path(location)
        self._bucket = BucketDirectory(location) if is_url(location) else None
        self._patience = patience
        self._seen: object = None
        self._since = 0.0

    def is_written(self) -> bool:
        """Whether a process holds the lock."""
        if self._bucket is None:
            return is_locked(self._path)
        owner = lease_owner(self._bucket)
        if owner is None or is_dead(owner):
            return False
        if owner != self._seen:
            self._seen, self._since = owner, time.monotonic()
        return time.monotonic() - self._since < self._patience
