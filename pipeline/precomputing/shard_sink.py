"""Shard sinks: write the shards of a store on a file system or in a bucket, each whole or not at all.

    with sink.open(task) as shard:
        shard.write(records)  # of the next views, as often as needed
    shard.info  # what the manifest will state

When the context ends, the file is closed, reopened, counted and checksummed, gets its name, and a note beside it
states what it holds. A noted shard is finished: it can be published, and no later run computes it again.
"""

from __future__ import annotations

import abc
import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import DataError, TryAgainError
from pipeline.storage.bucket import BucketDirectory, Object, is_url
from pipeline.storage.checked_json import parse_json
from pipeline.storage.lease import check_lease
from pipeline.store.layout import NOTE_LIMIT, PENDING, below, split_directory
from pipeline.store.serialization import serialize
from pipeline.store.shards import (
    ShardFile,
    ShardInfo,
    ShardTask,
    check_shard,
    create_shard,
    finished_shard,
    note_path,
    note_text,
    noted_shard,
    write_note,
)
from pipeline.store.softmax import fidelity
from pipeline.store.spec import Spec
from pipeline.views.records import ViewRecords


class RecordEncoder:
    """Serializes the records of one shard and measures the error that the codec adds."""

    def __init__(self, spec: Spec) -> None:
        self._codec, self._temperature = spec.make_codec(), spec.temperature
        self._kl, self._max_error = 0.0, 0.0

    def encode(self, records: ViewRecords, *, first_view: int) -> list[bytes]:
        """Serializes records of consecutive views with logits as the teacher returned them.

        Args:
          records: n records.
          first_view: index of the first view, for errors.

        Raises:
          DataError: a logit does not fit the codec.
        """
        encoded = self._codec.encode(records.logits, first_view=first_view)
        kl, error = fidelity(records.logits, self._codec.decode(encoded), self._temperature)
        self._kl += kl
        self._max_error = max(self._max_error, error)
        return serialize(records, encoded)

    def info(self, *, records: int, size: int, sha256: str) -> ShardInfo:
        """Manifest entry of the shard with all encoded records."""
        return ShardInfo(
            records=records, bytes=size, sha256=sha256, kl=self._kl / records, max_error=self._max_error
        )


class OpenShard:
    """A shard within the context of `ShardSink.open`.

    Attributes:
      info: manifest entry; set when the context has ended without an exception.
      adopted: whether `info` describes the shard of a duplicate of this task that finished first.
    """

    info: ShardInfo

    def __init__(self, task: ShardTask, spec: Spec, file: ShardFile) -> None:
        self._task, self._file, self._encoder = task, file, RecordEncoder(spec)
        self._next_view = task.first
        self.adopted = False

    def write(self, records: ViewRecords) -> None:
        """Appends the records of the next views with logits as the teacher returned them.

        Raises:
          DataError: a logit does not fit the codec.
          UserError: the disk is full or not writable.
        """
        self._file.write(self._encoder.encode(records, first_view=self._next_view))
        self._next_view += len(records.example)

    def finish(self) -> ShardInfo:
        """Sets and returns `info`, once the file is verified."""
        self.info = self._encoder.info(
            records=self._task.records, size=self._file.size, sha256=self._file.sha256
        )
        return self.info


class ShardSink(abc.ABC):
    """Writes the shards of a store."""

    def __init__(self, spec: Spec) -> None:
        self._spec, self._digest = spec, spec.digest()

    @contextlib.contextmanager
    def open(self, task: ShardTask) -> Iterator[OpenShard]:
        """Writes a shard within the context. Only a repair replaces a file of the same name.

        Raises:
          TryAgainError: another process has written a different shard under this name, or has taken the store over.
          UserError: the disk is full, or the disk or the bucket is not writable.
          DataError: the file does not read back, or a repaired shard differs from the published one.
        """
        shard = None
        try:
            with self._create(task) as file:
                shard = OpenShard(task, self._spec, file)
                yield shard
        except FileExistsError as error:
            if shard is None or not file.sha256:  # raised by the context itself
                raise
            # A duplicate of this task, on a machine that rounds differently, finished first. Its shard stays.
            if (found := self.finished(task)) is None:
                raise TryAgainError(
                    f"{task.name}: another process has written other content there; end it if it still runs, and run the "
                    "same command again"
                ) from error
            shard.info, shard.adopted = found, True
            return
        info = shard.finish()
        if not task.sha256:  # a repaired shard is in the manifest
            self._note(task, info)

    @abc.abstractmethod
    def _create(self, task: ShardTask) -> contextlib.AbstractContextManager[ShardFile]:
        """A verified shard file at its final place; see `create_shard`."""

    @abc.abstractmethod
    def _note(self, task: ShardTask, info: ShardInfo) -> None:
        """Writes the note that makes a shard finished."""

    @abc.abstractmethod
    def finished(self, task: ShardTask) -> ShardInfo | None:
        """Manifest entry of a finished shard, or None.

        The note has to be for exactly `task` and this spec, and the file has to have the noted size.
        """

    @abc.abstractmethod
    def check(self, task: ShardTask, info: ShardInfo) -> None:
        """Compares a shard with its manifest entry before it is published.

        Raises:
          DataError: size or SHA-256 differs.
        """

    @abc.abstractmethod
    def remove(self, task: ShardTask) -> None:
        """Removes an unpublished shard and its note.

        Raises:
          TryAgainError: another run has taken the store over and may have published the shard.
        """


class LocalShardSink(ShardSink):
    """Writes the shards of a store on a file system."""

    def __init__(self, store: Path, spec: Spec) -> None:
        super().__init__(spec)
        self._store = store

    def _path(self, task: ShardTask) -> Path:
        return split_directory(self._store, task.split) / task.name

    def _create(self, task: ShardTask) -> contextlib.AbstractContextManager[ShardFile]:
        return create_shard(
            self._path(task), task.records, expected=task.sha256, replace=task.sha256 is not None
        )

    def _note(self, task: ShardTask, info: ShardInfo) -> None:
        write_note(split_directory(self._store, task.split), task, info, digest=self._digest)

    def finished(self, task: ShardTask) -> ShardInfo | None:
        return finished_shard(split_directory(self._store, task.split), task, digest=self._digest)

    def check(self, task: ShardTask, info: ShardInfo) -> None:
        check_shard(self._path(task), info, stated="in the note on it")

    def remove(self, task: ShardTask) -> None:
        note_path(split_directory(self._store, task.split), task).unlink(missing_ok=True)
        self._path(task).unlink(missing_ok=True)


class BucketShardSink(ShardSink):
    """Writes the shards of a store in a bucket: verified on this machine, uploaded, and read back.

    Args:
      bucket: directory of the store.
      lease: lease of the lock under which the run writes.
      scratch: directory for shards that are not uploaded yet; the directory of temporary files by default.
    """

    def __init__(
        self, bucket: BucketDirectory, spec: Spec, lease: str, *, scratch: Path | None = None
    ) -> None:
        super().__init__(spec)
        self._bucket, self._lease, self._scratch = bucket, lease, scratch

    def _name(self, task: ShardTask) -> str:
        return f"{below(task.split)}/{task.name}".lstrip("/")

    def _check_lease(self) -> None:
        check_lease(self._bucket, self._lease)

    @contextlib.contextmanager
    def _create(self, task: ShardTask) -> Iterator[ShardFile]:
        with tempfile.TemporaryDirectory(prefix="view-distill-", dir=self._scratch) as scratch:
            path = Path(scratch, task.name)
            with create_shard(path, task.records, expected=task.sha256) as file:
                yield file
            uploaded = self._upload(path, task)
        try:
            self._bucket.fetch(self._name(task), size=file.size, sha256=file.sha256).close()
        except FileNotFoundError as error:
            raise self._removed(task) from error
        except DataError as error:
            if uploaded:
                raise
            self._check_lease()
            raise FileExistsError(str(error)) from error

    def _upload(self, path: Path, task: ShardTask) -> bool:
        """Uploads a shard while this run holds the lock; returns False if the object exists.

        Only a repair replaces an object. A run that paused during an upload, and whose lock was taken over, must not
        replace a shard that another run has published since.
        """
        try:
            create = task.sha256 is None
            self._bucket.upload(path, self._name(task), create=create, before=self._check_lease)
        except FileExistsError:  # of a duplicate of this task, or of an attempt whose answer was lost
            return False
        return True

    def _removed(self, task: ShardTask) -> TryAgainError:
        """The error for a shard that was uploaded and is missing.

        Raises:
          TryAgainError: another run has taken the store over.
        """
        self._check_lease()
        return TryAgainError(
            f"{self._bucket.place(self._name(task))}: was uploaded, but is missing now; end the process that removed it, and "
            "run the same command again"
        )

    def _note(self, task: ShardTask, info: ShardInfo) -> None:
        try:
            version = self._bucket.stat(self._name(task)).version
        except FileNotFoundError as error:
            raise self._removed(task) from error
        text = note_text(task, info, digest=self._digest, version=version)
        self._bucket.write(note_name(task), text.encode(), before=self._check_lease)

    def finished(self, task: ShardTask) -> ShardInfo | None:
        """Implements `ShardSink`. The object also has to have the noted version, whose content its writer verified."""
        try:
            note = parse_json(self._bucket.read(note_name(task), limit=NOTE_LIMIT).decode())
            info = noted_shard(note, task, digest=self._digest)
            there = None if info is None else self._bucket.stat(self._name(task))
        except (FileNotFoundError, ValueError):
            return None
        return info if info is not None and there == Object(info.bytes, note.get("version")) else None

    def check(self, task: ShardTask, info: ShardInfo) -> None:
        """Implements `ShardSink`; downloads only an object of another version than the noted one."""
        if self.finished(task) != info:
            try:
                self._bucket.fetch(self._name(task), size=info.bytes, sha256=info.sha256).close()
            except FileNotFoundError as error:
                raise DataError(
                    f"{self._bucket.place(self._name(task))}: was finished, but is missing now"
                ) from error

    def remove(self, task: ShardTask) -> None:
        for name in (note_name(task), self._name(task)):
            self._bucket.remove(name, before=self._check_lease)


def note_name(task: ShardTask) -> str:
    """Object name of the note on a shard of a store in a bucket."""
    return f"{below(task.split)}/{PENDING}/{task.name}.json".lstrip("/")


def open_sink(store: str, spec: Spec, *, lease: str | None, scratch: str | Path | None = None) -> ShardSink:
    """Opens the sink of a store.

    Args:
      store: path or URL.
      lease: see `BucketShardSink`.
      scratch: see `BucketShardSink`; ignored where this machine has no such directory. The command removes it, with the
        files of worker processes that were ended.
    """
    if not is_url(store):
        return LocalShardSink(Path(store), spec)
    if lease is None:
        raise ValueError(f"{store}: written without a lease")
    own = Path(scratch) if scratch is not None and Path(scratch).is_dir() else None
    return BucketShardSink(BucketDirectory(store), spec, lease, scratch=own)
