"""Where a precompute's shards go: into a store on a file system, or one in a bucket; each whole or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from pipeline.errors import DataError, TryAgainError
from pipeline.storage.bucket import BucketDirectory, Object, is_url
from pipeline.storage.checked_json import parse_json
from pipeline.storage.lease import check_lease
from pipeline.store.layout import NOTE_LIMIT, PENDING, below, split_directory
from pipeline.store.shards import (
    ShardInfo,
    ShardTask,
    check_shard,
    finished_shard,
    note_path,
    note_text,
    noted_shard,
    write_note,
    write_shard,
)


class ShardSink(Protocol):
    """Takes the shards of a store."""

    def finished(self, task: ShardTask) -> ShardInfo | None:
        """The finished shard, if a note is on exactly `task` and what is there is as large as noted, else None."""

    def check(self, task: ShardTask, info: ShardInfo) -> None:
        """Compares what is there with `info`, before it is published.

        Raises:
          DataError: size or SHA-256 differs.
        """

    def write(self, task: ShardTask, chunks: Iterable[list[bytes]]) -> tuple[int, str]:
        """Writes a shard's serialized records; size in bytes and SHA-256 of what reads back.

        Only a shard to be repaired takes the place of what has its name.

        Raises:
          FileExistsError: another shard of that name is there, with other content; it stays.
          UserError: the disk is full, the bucket cannot be written, or another run has taken the store over.
          DataError: it does not read back, or is not the shard that is to be repaired.
        """

    def note(self, task: ShardTask, info: ShardInfo) -> None:
        """Notes what a shard holds: from now on it is finished, and can be published."""

    def remove(self, task: ShardTask) -> None:
        """Removes a shard that is not published, and the note on it."""


class LocalShardSink:
    """Into a store on a file system.

    Args:
      store: its directory.
      digest: of its spec.
    """

    def __init__(self, store: Path, digest: str) -> None:
        self._store, self._digest = store, digest

    def _path(self, task: ShardTask) -> Path:
        return split_directory(self._store, task.split) / task.name

    def finished(self, task: ShardTask) -> ShardInfo | None:
        """Implements `ShardSink`."""
        return finished_shard(split_directory(self._store, task.split), task, digest=self._digest)

    def check(self, task: ShardTask, info: ShardInfo) -> None:
        """Implements `ShardSink`."""
        check_shard(self._path(task), info, stated="in the note on it")

    def write(self, task: ShardTask, chunks: Iterable[list[bytes]]) -> tuple[int, str]:
        """Implements `ShardSink`."""
        return write_shard(
            self._path(task), chunks, task.records, expected=task.sha256, replace=task.sha256 is not None
        )

    def note(self, task: ShardTask, info: ShardInfo) -> None:
        """Implements `ShardSink`."""
        write_note(split_directory(self._store, task.split), task, info, digest=self._digest)

    def remove(self, task: ShardTask) -> None:
        """Implements `ShardSink`."""
        note_path(split_directory(self._store, task.split), task).unlink(missing_ok=True)
        self._path(task).unlink(missing_ok=True)


class BucketShardSink:
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

    def finished(self, task: ShardTask) -> ShardInfo | None:
        """Implements `ShardSink`.

        The object's version has to be the noted one, too: its writer has read that back and verified it.
        """
        try:
            note = parse_json(self._bucket.read(note_name(task), limit=NOTE_LIMIT).decode())
            info = noted_shard(note, task, digest=self._digest)
            there = None if info is None else self._bucket.stat(self._name(task))
        except (FileNotFoundError, ValueError):
            return None
        return info if info is not None and there == Object(info.bytes, note.get("version")) else None

    def check(self, task: ShardTask, info: ShardInfo) -> None:
        """Implements `ShardSink`; downloads only what is not of the noted version."""
        if self.finished(task) != info:
            try:
                self._bucket.fetch(self._name(task), size=info.bytes, sha256=info.sha256).close()
            except FileNotFoundError as error:
                raise DataError(
                    f"{self._bucket.place(self._name(task))}: finished, and gone since"
                ) from error

    def write(self, task: ShardTask, chunks: Iterable[list[bytes]]) -> tuple[int, str]:
        """Implements `ShardSink`."""
        with tempfile.TemporaryDirectory(prefix="view-distill-", dir=self._scratch) as scratch:
            path = Path(scratch, task.name)
            size, sha256 = write_shard(path, chunks, task.records, expected=task.sha256)
            created = self._upload(path, task)
        try:
            self._bucket.fetch(self._name(task), size=size, sha256=sha256).close()
        except FileNotFoundError as error:
            raise self._gone(task) from error
        except DataError as error:
            if created:
                raise
            self._check_lease()
            raise FileExistsError(str(error)) from error
        return size, sha256

    def _check_lease(self) -> None:
        check_lease(self._bucket, self._lease)

    def _gone(self, task: ShardTask) -> TryAgainError:
        """The error for a shard that was uploaded and is not there.

        Raises:
          TryAgainError: another run has taken the store over.
        """
        self._check_lease()
        return TryAgainError(
            f"{self._bucket.place(self._name(task))}: uploaded, and removed since; end what else writes there, and run the "
            "same command again"
        )

    def _upload(self, path: Path, task: ShardTask) -> bool:
        """Puts a shard there, for as long as the lock is this run's; whether it did.

        Only where none is, unless it is to be repaired: a run that slept in an upload, and whose lock was broken, does
        not put its shard over one that another has published since, and cut elsewhere.
        """
        create = task.sha256 is None
        try:
            self._bucket.upload(path, self._name(task), create=create, before=self._check_lease)
        except FileExistsError:  # of a duplicate of this task, or of an attempt whose answer was lost
            return False
        return True

    def note(self, task: ShardTask, info: ShardInfo) -> None:
        """Implements `ShardSink`."""
        try:
            version = self._bucket.stat(self._name(task)).version
        except FileNotFoundError as error:
            raise self._gone(task) from error
        text = note_text(task, info, digest=self._digest, version=version)
        self._bucket.write(note_name(task), text.encode(), before=self._check_lease)

    def remove(self, task: ShardTask) -> None:
        """Implements `ShardSink`.

        Raises:
          TryAgainError: another run has taken the store over, and may have published the shard.
        """
        for name in (note_name(task), self._name(task)):
            self._bucket.remove(name, before=self._check_lease)


def note_name(task: ShardTask) -> str:
    """Name, in a store in a bucket, of the note on a shard."""
    return f"{below(task.split)}/{PENDING}/{task.name}.json".lstrip("/")


def open_sink(store: str, *, digest: str, lease: str | None, scratch: str | Path | None = None) -> ShardSink:
    """The sink of a store, by its location.

    Args:
      store: path or URL.
      digest, lease: see `BucketShardSink`.
      scratch: likewise, where this machine has it: a directory of the command's, that is removed with whatever a worker
        process that was ended has left there.
    """
    if not is_url(store):
        return LocalShardSink(Path(store), digest)
    if lease is None:
        raise ValueError(f"{store}: written without a lease")
    own = Path(scratch) if scratch is not None and Path(scratch).is_dir() else None
    return BucketShardSink(BucketDirectory(store), digest, lease, scratch=own)
