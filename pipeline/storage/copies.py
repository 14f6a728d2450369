"""Directories and files in buckets, copied once a machine: source data sets and teachers, which are read at random.

A copy is keyed by what the bucket lists (names, sizes, ETags), so that what changes there is copied anew. Processes
that want the same wait for the first, which downloads beside the final place, compares every size, and renames.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

from tqdm import tqdm

from pipeline.errors import TryAgainError, UserError
from pipeline.errors.causes import first_line
from pipeline.storage.bucket import BucketDirectory, Object
from pipeline.storage.cache import DATA_CACHE_BYTES, cache_dir
from pipeline.storage.files import TEMPORARY, atomic_directory, remove_directory
from pipeline.storage.lock import flock

_DOWNLOADS = 8  # at a time

# Locks of the copies that this process reads: while one is held, no other process removes the copy.
_in_use: dict[Path, IO[str]] = {}


def local_copy(
    bucket: BucketDirectory, objects: Mapping[str, Object], *, flag: str, limit: int = DATA_CACHE_BYTES
) -> Path:
    """A directory of this machine with some of a bucket's objects, for as long as this process runs.

    Args:
      bucket: a directory in it.
      objects: of `bucket.objects()`; their names become paths.
      flag: that named the place, for errors.
      limit: bytes of all copies on this machine; the ones that were used longest ago make room.

    Raises:
      UserError: more than `limit`, or than the disk has; an object's name is no path in a directory.
    """
    for name in objects:
        if name.startswith("/") or ".." in name.split("/"):
            raise UserError(f"{flag}={bucket.url}: {name!r} is no name of a file")
    needed = sum(found.size for found in objects.values())
    if needed > limit:
        raise UserError(
            f"{flag}={bucket.url}: {needed:,} bytes are copied to this machine, --data_cache_bytes={limit} allows fewer; "
            f"pass {needed} or more, or a path where the bucket is mounted"
        )
    listing = json.dumps([bucket.url, sorted((name, o.size, o.version) for name, o in objects.items())])
    root = cache_dir() / "copies"
    path = root / hashlib.sha256(listing.encode()).hexdigest()[:32]
    if path in _in_use:
        return path
    try:
        root.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as refused:
            lock = refused.enter_context(_lock_path(path).open("w"))
            while True:
                flock(lock, shared=True)  # held by every process that reads the copy
                if path.is_dir():
                    break
                flock(lock)  # the first of several processes copies, the others wait
                if not path.is_dir():
                    with atomic_directory(path) as fresh:
                        _make_room(root, needed, limit=limit, flag=flag)
                        _download(bucket, objects, fresh)
                # While the kind of the lock changes there is none, and another process may remove the copy: look again.
            os.utime(path)
            _in_use[path] = lock
            refused.pop_all()
    except OSError as error:
        raise UserError(
            f"{root}: cannot be written ({error.strerror}); set VIEW_DISTILL_CACHE to a directory that can"
        ) from error
    return path


def _lock_path(copy: Path) -> Path:
    """The lock of a copy, whether finished or under way."""
    return copy.with_name(f"{copy.name.removeprefix(TEMPORARY)}.lock")


def _download(bucket: BucketDirectory, objects: Mapping[str, Object], fresh: Path) -> None:
    """Copies objects into a new directory."""
    for name in objects:
        (fresh / name).parent.mkdir(parents=True, exist_ok=True)
    _download_all(bucket, objects, fresh)
    _check_unchanged(bucket, objects)


def _check_unchanged(bucket: BucketDirectory, objects: Mapping[str, Object]) -> None:
    """Compares what is there with the listing that a copy is named by: else it would be kept under that name for good."""
    there = bucket.objects(os.path.commonpath(list(objects)))
    if changed := [name for name, found in objects.items() if there.get(name) != found]:
        raise TryAgainError(
            f"{bucket.url}: changes while it is copied ({changed[0]}, for one); run the same command again"
        )


def _download_all(bucket: BucketDirectory, objects: Mapping[str, Object], fresh: Path) -> None:
    with (
        tqdm(
            total=sum(found.size for found in objects.values()),
            unit="B",
            unit_scale=True,
            desc=f"copying {bucket.url}",
            dynamic_ncols=True,
        ) as bar,
        concurrent.futures.ThreadPoolExecutor(_DOWNLOADS) as pool,
    ):
        copying = {
            pool.submit(bucket.download, name, fresh / name, size=found.size): found.size
            for name, found in objects.items()
        }
        try:
            for done in concurrent.futures.as_completed(copying):
                done.result()
                bar.update(copying[done])
        except FileNotFoundError as error:
            pool.shutdown(wait=False, cancel_futures=True)
            raise TryAgainError(
                f"{bucket.url}: changes while it is copied ({first_line(error)} is gone); run the same command again"
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _make_room(root: Path, needed: int, *, limit: int, flag: str) -> None:
    """Removes copies that no process reads, those used longest ago first, until `needed` bytes fit."""
    used = {copy: _last_used(copy) for copy in root.iterdir() if copy.is_dir()}
    held = {copy: _size(copy) for copy in used}
    for copy in sorted(used, key=used.__getitem__):
        if sum(held.values()) + needed <= limit and needed <= shutil.disk_usage(root).free:
            return
        with _unused(copy) as unused:
            if unused:
                remove_directory(copy)
                del held[copy]
    if sum(held.values()) + needed > limit:
        raise UserError(
            f"{flag}: {needed:,} bytes more are copied to {root}, where copies in use have {sum(held.values()):,} of the "
            f"{limit:,} that --data_cache_bytes allows; raise it, or end the processes that use them"
        )
    if needed > (free := shutil.disk_usage(root).free):
        raise UserError(
            f"{flag}: {needed:,} bytes are copied to {root}, where {free:,} are free; make room, or set "
            "VIEW_DISTILL_CACHE to a directory on a larger disk"
        )


def _last_used(copy: Path) -> float:
    with contextlib.suppress(FileNotFoundError):  # finished or removed meanwhile, by another process
        return copy.stat().st_mtime
    return 0.0


def _size(copy: Path) -> int:
    size = 0
    for directory, _, names in os.walk(copy):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                size += Path(directory, name).stat().st_size
    return size


@contextlib.contextmanager
def _unused(copy: Path) -> Iterator[bool]:
    """Whether no process holds the lock of a copy; if so, none can take it meanwhile."""
    with _lock_path(copy).open("w") as lock:
        yield flock(lock, wait=False)


def copied_teacher(url: str) -> Path:
    """A teacher in a bucket, copied: a SavedModel's directory, or a `.keras` file.

    Raises:
      UserError: there is nothing, or no room for it.
    """
    parent, _, last = url.rstrip("/").rpartition("/")
    is_file = last.endswith(".keras")
    bucket = BucketDirectory(parent if is_file else url)
    objects = bucket.objects(last if is_file else "")
    if not objects:
        raise UserError(f"--teacher={url}: nothing is there; expected a SavedModel or a .keras file")
    path = local_copy(bucket, objects, flag="--teacher")
    return path / last if is_file else path


def copied_dataset(name: str, url: str, *, limit: int = DATA_CACHE_BYTES) -> Path:
    """A TFDS data directory with one data set of a bucket, copied.

    Args:
      name: `NAME[/CONFIG][:VERSION]`; without a version the highest, without a configuration the only one.
      url: of the TFDS data directory.
      limit: see `local_copy`.

    Raises:
      UserError: it is not there, or there are several configurations.
    """
    bucket = BucketDirectory(url)
    path, _, version = name.partition(":")
    objects = bucket.objects(path)
    found = [n[: -len("/dataset_info.json")] for n in objects if n.endswith("/dataset_info.json")]
    found = [place for place in found if not version or place.rsplit("/", 1)[1] == version]
    if not found:
        there = ", ".join(sorted({n.rsplit("/", 1)[0] for n in objects})) or "nothing"
        raise UserError(f"--dataset={name}: not found in --data_dir={url}, which has {there} of it")
    configs = sorted({place.rsplit("/", 1)[0] for place in found})
    if len(configs) > 1:
        raise UserError(
            f"--dataset={name}: --data_dir={url} has the configurations {', '.join(configs)}; name one"
        )
    place = max(found, key=_version_key)
    return local_copy(
        bucket,
        {n: o for n, o in objects.items() if n.startswith(f"{place}/")},
        flag="--data_dir",
        limit=limit,
    )


def _version_key(place: str) -> tuple[int, ...]:
    parts = place.rsplit("/", 1)[1].split(".")
    return tuple(int(part) if part.isdigit() else -1 for part in parts)
