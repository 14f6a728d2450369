"""How a split's shards are opened, each verified against the manifest: from a disk, or from a bucket ahead of need."""

from __future__ import annotations

import collections
import concurrent.futures
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from pipeline.errors import DataError
from pipeline.storage.bucket import BucketDirectory, named
from pipeline.store.shards import ShardInfo, check_shard, open_shard, shard_name

_OPEN_SHARDS = 64  # an epoch-ordered replay needs two at a time; more are for evaluation and verify
_KEPT_SHARDS = 256  # of a bucket: each is an open file, of which a process may have 1,024 by default
DOWNLOADS = 4  # at a time, and shards fetched ahead of need


class Opener(Protocol):
    """Opens the shards of a split."""

    def place(self, number: int) -> str:
        """Where a shard is, for people."""

    def open(self, number: int) -> ArrayRecordReader:
        """A reader of a shard; the first time, after comparing size, SHA-256 and count with the manifest.

        Raises:
          DataError: any of them differs, or there is no such shard; both sides are shown.
        """

    def verify(self, number: int) -> ArrayRecordReader:
        """`open`, compared whether or not it was before."""

    def extend(self, shards: Sequence[ShardInfo]) -> None:
        """Takes the shards of a longer manifest, which begins with those that are known."""

    def files(self) -> dict[str, int]:
        """Name and bytes of each file in the split's directory, of other splits' too; opens none."""


_FileState = tuple[int, int, int, int]


def _state(path: Path) -> _FileState | None:
    """What changes when a file is replaced or written; None where there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    # Not its ctime, which a hard link or another mode changes, too.
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


class DiskOpener:
    """Of a store on this machine's file systems."""

    def __init__(self, directory: Path, split: str, shards: Sequence[ShardInfo]) -> None:
        self._directory, self._split, self._shards = directory, split, shards
        self._readers: collections.OrderedDict[int, ArrayRecordReader] = collections.OrderedDict()
        # Shards that were verified, and the file that each was then.
        self._verified: dict[int, _FileState] = {}
        self._lock = threading.Lock()

    def _path(self, number: int) -> Path:
        return self._directory / shard_name(self._split, number)

    def place(self, number: int) -> str:
        """Implements `Opener`."""
        return str(self._path(number))

    def open(self, number: int) -> ArrayRecordReader:
        """Implements `Opener`."""
        with self._lock:
            if number not in self._readers:
                self._readers[number] = self._reopen(number)
                if len(self._readers) > _OPEN_SHARDS:
                    self._readers.popitem(last=False)  # closed when its last user lets go of it
            self._readers.move_to_end(number)
            return self._readers[number]

    def _reopen(self, number: int) -> ArrayRecordReader:
        """A reader of a shard, verified unless the file is the one that was verified before."""
        path = self._path(number)
        if number in self._verified and _state(path) == self._verified[number]:
            reader = open_shard(path, self._shards[number].records)
            if _state(path) == self._verified[number]:
                return reader
            reader.close()
        reader, self._verified[number] = self._verify(number)
        return reader

    def verify(self, number: int) -> ArrayRecordReader:
        """Implements `Opener`."""
        return self._verify(number)[0]

    def _verify(self, number: int) -> tuple[ArrayRecordReader, _FileState]:
        path, info = self._path(number), self._shards[number]
        before = _state(path)
        check_shard(path, info)
        reader = open_shard(path, info.records)
        # What was compared is what was opened, unless the file was replaced between the two.
        if (after := _state(path)) is None or after != before:
            reader.close()
            raise DataError(f"{path}: changed while it was verified; something else is writing it")
        return reader, after

    def extend(self, shards: Sequence[ShardInfo]) -> None:
        """Implements `Opener`."""
        self._shards = shards

    def files(self) -> dict[str, int]:
        """Implements `Opener`."""
        with os.scandir(self._directory) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}


class ShardCache:
    """Shards of a bucket in files of this machine that have no name: nothing is left of them, however a run ends.

    Args:
      capacity: bytes of all the files, of which there are at most `_KEPT_SHARDS`; a shard in use is kept beyond it.
      scratch: directory of whose file system the space is; by default that of temporary files.
    """

    def __init__(self, capacity: int, *, scratch: Path | None = None) -> None:
        self.capacity = capacity
        self._scratch = scratch
        self._kept: collections.OrderedDict[
            tuple[str, int], tuple[int, concurrent.futures.Future[ArrayRecordReader]]
        ] = collections.OrderedDict()
        self._bytes = 0
        # Threads that wait, by shard.
        self._waited: collections.Counter[tuple[str, int]] = collections.Counter()
        self._lock = threading.Lock()
        self._downloads = threading.Semaphore(DOWNLOADS)

    def get(
        self, bucket: BucketDirectory, split: str, shards: Sequence[ShardInfo], wanted: Sequence[int]
    ) -> ArrayRecordReader:
        """The reader of the first shard in `wanted`, waited for; the others are fetched as far as there is room.

        Raises:
          DataError: a shard is missing or damaged.
          TryAgainError: the link is down.
        """
        keys = [(bucket.place(split), number) for number in wanted]
        with self._lock:
            for key in keys:
                if key in self._kept and _failed(self._kept[key][1]):
                    self._forget(key)  # to be tried again
                if key in self._kept:
                    self._kept.move_to_end(key)
                    continue
                info = shards[key[1]]
                if not self._make_room(info.bytes, keep=keys) and key != keys[0]:
                    break
                self._kept[key] = (info.bytes, self._fetch(bucket, split, key[1], info))
                self._bytes += info.bytes
            future = self._kept[keys[0]][1]
            self._waited[keys[0]] += 1
        try:
            return future.result()
        finally:
            with self._lock:
                self._waited[keys[0]] -= 1

    def _fetch(
        self, bucket: BucketDirectory, split: str, number: int, info: ShardInfo
    ) -> concurrent.futures.Future[ArrayRecordReader]:
        """`fetch_shard` in a thread of its own, which, unlike a pool's, does not keep a process from ending."""
        future: concurrent.futures.Future[ArrayRecordReader] = concurrent.futures.Future()

        def fetch() -> None:
            with self._downloads:
                if not future.set_running_or_notify_cancel():
                    return
                try:
                    future.set_result(fetch_shard(bucket, split, number, info, self._scratch))
                except BaseException as error:  # noqa: BLE001  # told to whoever asks for it
                    future.set_exception(error)

        threading.Thread(target=fetch, name=f"shard {number}", daemon=True).start()
        return future

    def _make_room(self, size: int, *, keep: Sequence[tuple[str, int]]) -> bool:
        """Forgets the shards that were used longest ago until one of `size` bytes fits; whether it does.

        Not those that another thread waits for: it would find its own cancelled.
        """
        for key in list(self._kept):
            if self._has_room(size):
                break
            if key not in keep and not self._waited[key]:
                self._forget(key)
        return self._has_room(size)

    def _has_room(self, size: int) -> bool:
        return self._bytes + size <= self.capacity and len(self._kept) < _KEPT_SHARDS

    def _forget(self, key: tuple[str, int]) -> None:
        size, future = self._kept.pop(key)
        future.cancel()
        self._bytes -= size  # its file ends with its reader, when the last user lets go of that


def _failed(future: concurrent.futures.Future[ArrayRecordReader]) -> bool:
    return future.done() and (future.cancelled() or future.exception() is not None)


def fetch_shard(
    bucket: BucketDirectory, split: str, number: int, info: ShardInfo, scratch: Path | None = None
) -> ArrayRecordReader:
    """A reader of a verified copy of a shard.

    Raises:
      DataError: it is missing or damaged.
      TryAgainError: the link is down.
    """
    name = shard_name(split, number)
    try:
        file = bucket.fetch(name, size=info.bytes, sha256=info.sha256, scratch=scratch)
    except FileNotFoundError as error:
        raise DataError(f"{bucket.place(name)}: no such shard; the metadata name it") from error
    with file:
        # Opens it once more: the content lives as long as the reader.
        return open_shard(Path(named(file)), info.records, place=bucket.place(name))


class BucketOpener:
    """Of a store in a bucket: what follows is fetched while a shard is read.

    Args:
      bucket: directory of the split.
      split: its name.
      shards: of the manifest.
      cache: where fetched shards are kept.
      epoch: views an epoch, whose last views are mixed with its first; 0 for views without partners.
      ahead: shards that are fetched at a time, the one that is asked for included.
    """

    def __init__(
        self,
        bucket: BucketDirectory,
        split: str,
        shards: Sequence[ShardInfo],
        *,
        cache: ShardCache,
        epoch: int,
        ahead: int = DOWNLOADS,
    ) -> None:
        self._bucket, self._split, self._cache = bucket, split, cache
        self._epoch, self._ahead = epoch, ahead
        self.extend(shards)

    def extend(self, shards: Sequence[ShardInfo]) -> None:
        """Implements `Opener`."""
        self._shards = shards
        self._ends = np.cumsum([shard.records for shard in shards])

    def place(self, number: int) -> str:
        """Implements `Opener`."""
        return self._bucket.place(shard_name(self._split, number))

    def open(self, number: int) -> ArrayRecordReader:
        """Implements `Opener`."""
        return self._cache.get(self._bucket, self._split, self._shards, self._wanted(number))

    def _wanted(self, number: int) -> list[int]:
        """A shard, and those that will be needed after it, in that order."""
        if self._ahead == 1:
            return [number]
        following = range(number, min(number + self._ahead, len(self._shards)))
        return list(dict.fromkeys(wanted for each in following for wanted in (each, *self._partners(each))))

    def _partners(self, number: int) -> list[int]:
        """Shards with the first view of an epoch that ends in this one: the partner of its last view."""
        if not self._epoch:
            return []
        end = int(self._ends[number])
        first = end - self._shards[number].records
        starts = range(first // self._epoch * self._epoch, end - self._epoch + 1, self._epoch)
        return np.unique(np.searchsorted(self._ends, np.asarray(starts, np.int64), side="right")).tolist()

    def verify(self, number: int) -> ArrayRecordReader:
        """Implements `Opener`."""
        return fetch_shard(self._bucket, self._split, number, self._shards[number])

    def files(self) -> dict[str, int]:
        """Implements `Opener`."""
        return {name: found.size for name, found in self._bucket.objects().items() if "/" not in name}
