"""Where a precompute's shards go: into a store on a file system, or one in a bucket; each whole or not at all."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from pipeline.buckets.directory import BucketDirectory, is_url
from pipeline.buckets.lease import check_lease
from pipeline.errors import DataError
from pipeline.store.layout import PENDING, below, split_directory
from pipeline.store.shards import (
    ShardInfo,
    ShardTask,
    adopt_shard,
    note_text,
    noted_shard,
    write_note,
    write_shard,
)
from pipeline.store.untrusted import NOTE_LIMIT, parse_json


class Outlet(Protocol):
    """Takes the shards of a store."""

    def adopt(self, task: ShardTask) -> ShardInfo | None:
        """The shard that a run that died left behind, if it verifies as exactly `task`, else None."""

    def write(self, task: ShardTask, chunks: Iterable[list[bytes]]) -> tuple[int, str]:
        """Writes a shard's serialized records; size in bytes and SHA-256 of what reads back.

        Raises:
          UserError: the disk is full, the bucket cannot be written, or another run has taken the store over.
          DataError: it does not read back, or is not the shard that is to be repaired.
        """

    def note(self, task: ShardTask, info: ShardInfo) -> None:
        """Notes what a shard holds, so that a run that dies before its metadata loses nothing."""


class DiskOutlet:
    """Into a store on a file system.

    Args:
      store: its directory.
      digest: of its spec.
    """

    def __init__(self, store: Path, digest: str) -> None:
        self._store, self._digest = store, digest

    def adopt(self, task: ShardTask) -> ShardInfo | None:
        """Implements `Outlet`."""
        return adopt_shard(split_directory(self._store, task.split), task, digest=self._digest)

    def write(self, task: ShardTask, chunks: Iterable[list[bytes]]) -> tuple[int, str]:
        """Implements `Outlet`."""
        path = split_directory(self._store, task.split) / task.name
        return write_shard(path, chunks, task.records, expected=task.sha256)

    def note(self, task: ShardTask, info: ShardInfo) -> None:
        """Implements `Outlet`."""
        write_note(split_directory(self._store, task.split), task, info, digest=self._digest)


class BucketOutlet:
    """Into a store in a bucket: written and verified here, uploaded, and read back.

    Args:
      bucket: directory of the store.
      digest: of its spec.
      lease: the lock under which the run writes.
      scratch: directory in which a shard is written before it is uploaded; by default that of temporary files.
    """

    def __init__(
        self, bucket: BucketDirectory, digest: str, lease: str, *, scratch: Path | None = None
    ) -> None:
        self._bucket, self._digest, self._lease, self._scratch = bucket, digest, lease, scratch

    def _name(self, task: ShardTask) -> str:
        return f"{below(task.split)}/{task.name}".lstrip("/")

    def adopt(self, task: ShardTask) -> ShardInfo | None:
        """Implements `Outlet`."""
        try:
            text = self._bucket.read(note_name(task), limit=NOTE_LIMIT).decode()
            info = noted_shard(parse_json(text), task, digest=self._digest)
            if info is not None:
                self._bucket.fetch(self._name(task), size=info.bytes, sha256=info.sha256).close()
        except (FileNotFoundError, ValueError, DataError):
            return None
        return info

    def write(self, task: ShardTask, chunks: Iterable[list[bytes]]) -> tuple[int, str]:
        """Implements `Outlet`."""
        with tempfile.TemporaryDirectory(prefix="view-distill-", dir=self._scratch) as scratch:
            path = Path(scratch, task.name)
            size, sha256 = write_shard(path, chunks, task.records, expected=task.sha256)
            self._upload(path, task)
        self._bucket.fetch(self._name(task), size=size, sha256=sha256).close()
        return size, sha256

    def _upload(self, path: Path, task: ShardTask) -> None:
        """Puts a shard there, for as long as the lock is this run's.

        Where none is, only where none is: a run that slept in an upload, and whose lock was broken, does not put its
        shard over one that another has published since, and cut elsewhere.
        """
        held = functools.partial(check_lease, self._bucket, self._lease)
        try:
            self._bucket.upload(path, self._name(task), create=True, before=held)
        except FileExistsError:  # of a run that died, or to be repaired
            self._bucket.upload(path, self._name(task), before=held)

    def note(self, task: ShardTask, info: ShardInfo) -> None:
        """Implements `Outlet`."""
        self._bucket.write(note_name(task), note_text(task, info, digest=self._digest).encode())


def note_name(task: ShardTask) -> str:
    """Name, in a store in a bucket, of the note on a shard."""
    return f"{below(task.split)}/{PENDING}/{task.name}.json".lstrip("/")


def open_outlet(store: str, *, digest: str, lease: str | None, scratch: str | Path | None = None) -> Outlet:
    """The outlet of a store, by its location.

    Args:
      store: path or URL.
      digest, lease: see `BucketOutlet`.
      scratch: likewise, where this machine has it: a directory of the command's, that is removed with whatever a worker
        process that was ended has left there.
    """
    if not is_url(store):
        return DiskOutlet(Path(store), digest)
    if lease is None:
        raise ValueError(f"{store}: written without a lease")
    own = Path(scratch) if scratch is not None and Path(scratch).is_dir() else None
    return BucketOutlet(BucketDirectory(store), digest, lease, scratch=own)
