"""Opens the shards of a split and verifies them against the manifest, on a disk or in a bucket with prefetching."""

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

_OPEN_SHARDS = 64  # a replay in epoch order needs two at a time; evaluation and verify need more
_KEPT_SHARDS = 256  # from a bucket; each is an open file, and the default limit of a process is 1,024
DOWNLOADS = 4  # parallel downloads, and number of shards fetched ahead


class Opener(Protocol):
    """Opens the shards of a split."""

    def place(self, number: int) -> str:
        """Path or URL of a shard, for messages."""

    def open(self, number: int) -> ArrayRecordReader:
        """Opens a shard. The first time, size, SHA-256 and number of records are compared with the manifest.

        Raises:
          DataError: the shard is missing, or one of them differs; shows both values.
        """

    def verify(self, number: int) -> ArrayRecordReader:
        """Opens a shard and compares it with the manifest, also if it was compared before."""

    def extend(self, shards: Sequence[ShardInfo]) -> None:
        """Replaces the shards by those of a longer manifest, which begins with the known ones."""

    def files(self) -> dict[str, int]:
        """Lists name and size in bytes of each file in the split's directory, which may have other splits, too."""


_FileState = tuple[int, int, int, int]


def _state(path: Path) -> _FileState | None:
    """Values that change when a file is replaced or written; None if there is no file."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    # Without ctime, which also changes with hard links and modes.
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


class DiskOpener:
    """Opens shards on file systems of this machine."""

    def __init__(self, directory: Path, split: str, shards: Sequence[ShardInfo]) -> None:
        self._directory, self._split, self._shards = directory, split, shards
        self._readers: collections.OrderedDict[int, ArrayRecordReader] = collections.OrderedDict()
        # State of each verified shard's file at that time.
        self._verified: dict[int, _FileState] = {}
        self._lock = threading.Lock()

    def _path(self, number: int) -> Path:
        return self._directory / shard_name(self._split, number)

    def place(self, number: int) -> str:
        return str(self._path(number))

    def open(self, number: int) -> ArrayRecordReader:
        with self._lock:
            if number not in self._readers:
                self._readers[number] = self._reopen(number)
                if len(self._readers) > _OPEN_SHARDS:
                    self._readers.popitem(last=False)  # closed with its last reference
            self._readers.move_to_end(number)
            return self._readers[number]

    def _reopen(self, number: int) -> ArrayRecordReader:
        """Opens a shard, and verifies it unless the file is unchanged since the last time."""
        path = self._path(number)
        if number in self._verified and _state(path) == self._verified[number]:
            reader = open_shard(path, self._shards[number].records)
            if _state(path) == self._verified[number]:
                return reader
            reader.close()
        reader, self._verified[number] = self._verify(number)
        return reader

    def verify(self, number: int) -> ArrayRecordReader:
        return self._verify(number)[0]

    def _verify(self, number: int) -> tuple[ArrayRecordReader, _FileState]:
        path, info = self._path(number), self._shards[number]
        before = _state(path)
        check_shard(path, info)
        reader = open_shard(path, info.records)
        # The compared file is the opened one unless it was replaced in between.
        if (after := _state(path)) is None or after != before:
            reader.close()
            raise DataError(
                f"{path}: changed while it was verified; stop the other process that writes it, and try again"
            )
        return reader, after

    def extend(self, shards: Sequence[ShardInfo]) -> None:
        self._shards = shards

    def files(self) -> dict[str, int]:
        with os.scandir(self._directory) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}


class ShardCache:
    """A cache of shards from buckets, in unnamed local files, which disappear with the process.

    Args:
      capacity: size limit in bytes; a shard in use may exceed it. The cache has at most `_KEPT_SHARDS` shards.
      scratch: directory for the files; that of temporary files by default.
    """

    def __init__(self, capacity: int, *, scratch: Path | None = None) -> None:
        self.capacity = capacity
        self._scratch = scratch
        self._kept: collections.OrderedDict[
            tuple[str, int], tuple[int, concurrent.futures.Future[ArrayRecordReader]]
        ] = collections.OrderedDict()
        self._bytes = 0
        # Number of waiting threads by shard.
        self._waited: collections.Counter[tuple[str, int]] = collections.Counter()
        self._lock = threading.Lock()
        self._downloads = threading.Semaphore(DOWNLOADS)

    def get(
        self, bucket: BucketDirectory, split: str, shards: Sequence[ShardInfo], wanted: Sequence[int]
    ) -> ArrayRecordReader:
        """Waits for the first shard in `wanted` and opens it. The others are fetched if there is room.

        Raises:
          DataError: a shard is missing or damaged.
          TryAgainError: the bucket does not answer.
        """
        keys = [(bucket.place(split), number) for number in wanted]
        with self._lock:
            for key in keys:
                if key in self._kept and _failed(self._kept[key][1]):
                    self._forget(key)  # and try again
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
        """Runs `fetch_shard` in a daemon thread: threads of a pool would keep the process from ending."""
        future: concurrent.futures.Future[ArrayRecordReader] = concurrent.futures.Future()

        def fetch() -> None:
            with self._downloads:
                if not future.set_running_or_notify_cancel():
                    return
                try:
                    future.set_result(fetch_shard(bucket, split, number, info, self._scratch))
                except BaseException as error:  # noqa: BLE001  # raised by `result`
                    future.set_exception(error)

        threading.Thread(target=fetch, name=f"shard {number}", daemon=True).start()
        return future

    def _make_room(self, size: int, *, keep: Sequence[tuple[str, int]]) -> bool:
        """Removes the least recently used shards until `size` bytes fit; returns whether they do.

        Shards that other threads wait for are kept, since their future would be cancelled.
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
        self._bytes -= size  # the file is removed with the last reference to its reader


def _failed(future: concurrent.futures.Future[ArrayRecordReader]) -> bool:
    return future.done() and (future.cancelled() or future.exception() is not None)


def fetch_shard(
    bucket: BucketDirectory, split: str, number: int, info: ShardInfo, scratch: Path | None = None
) -> ArrayRecordReader:
    """Downloads, verifies and opens a shard.

    Raises:
      DataError: the shard is missing or damaged.
      TryAgainError: the bucket does not answer.
    """
    name = shard_name(split, number)
    try:
        file = bucket.fetch(name, size=info.bytes, sha256=info.sha256, scratch=scratch)
    except FileNotFoundError as error:
        raise DataError(f"{bucket.place(name)}: shard is missing, but listed in manifest.json") from error
    with file:
        # Opens the file again: its content exists as long as the reader.
        return open_shard(Path(named(file)), info.records, place=bucket.place(name))


class BucketOpener:
    """Opens shards in a bucket, and prefetches the following ones.

    Args:
      bucket: directory of the split in the bucket.
      cache: cache of fetched shards.
      epoch: number of views per epoch, whose last view has the first as its partner; 0 for views without partners.
      ahead: number of shards fetched at a time, including the requested one.
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
        self._shards = shards
        self._ends = np.cumsum([shard.records for shard in shards])

    def place(self, number: int) -> str:
        return self._bucket.place(shard_name(self._split, number))

    def open(self, number: int) -> ArrayRecordReader:
        return self._cache.get(self._bucket, self._split, self._shards, self._wanted(number))

    def _wanted(self, number: int) -> list[int]:
        """A shard and the ones needed after it, in order."""
        if self._ahead == 1:
            return [number]
        following = range(number, min(number + self._ahead, len(self._shards)))
        return list(dict.fromkeys(wanted for each in following for wanted in (each, *self._partners(each))))

    def _partners(self, number: int) -> list[int]:
        """Shards with the first view of each epoch that ends in this shard: it is the partner of the last view."""
        if not self._epoch:
            return []
        end = int(self._ends[number])
        first = end - self._shards[number].records
        starts = range(first // self._epoch * self._epoch, end - self._epoch + 1, self._epoch)
        return np.unique(np.searchsorted(self._ends, np.asarray(starts, np.int64), side="right")).tolist()

    def verify(self, number: int) -> ArrayRecordReader:
        return fetch_shard(self._bucket, self._split, number, self._shards[number])

    def files(self) -> dict[str, int]:
        return {name: found.size for name, found in self._bucket.objects().items() if "/" not in name}
