"""Local copies of data sets and teachers in buckets, made once per machine, because they are read at random.

A copy is keyed by the bucket's listing (names, sizes, ETags), so changed objects are copied again. If several processes need the
same copy, the first downloads it and the others wait.
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
from pipeline.storage.bucket import BucketDirectory, Object
from pipeline.storage.cache import DATA_CACHE_BYTES, cache_dir
from pipeline.storage.files import TEMPORARY, atomic_directory, remove_directory
from pipeline.storage.lock import flock

_DOWNLOADS = 8  # downloads in parallel

# Locks of the copies that this process reads. While a lock is held, no other process removes the copy.
_in_use: dict[Path, IO[str]] = {}


def local_copy(
    bucket: BucketDirectory, objects: Mapping[str, Object], *, flag: str, limit: int = DATA_CACHE_BYTES
) -> Path:
    """A local directory with some of a bucket's objects, kept at least until this process ends.

    Args:
      objects: objects from `bucket.objects()`; their names become relative paths.
      flag: flag that names the location, for errors.
      limit: maximum size of all copies on this machine in bytes; the least recently used ones are removed first.

    Raises:
      UserError: the objects are larger than `limit` or the disk, or an object's name is not a relative path.
      TryAgainError: the objects changed during the copy.
    """
    for name in objects:
        if name.startswith("/") or ".." in name.split("/"):
            raise UserError(f"{flag}={bucket.url}: {name!r} cannot be a file name")
    needed = sum(found.size for found in objects.values())
    if needed > limit:
        raise UserError(
            f"{flag}={bucket.url}: a local copy needs {needed:,} bytes, more than `data_cache_bytes`={limit}; pass {needed} or "
            "more, or a path where the bucket is mounted"
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
            f"{root}: cannot be written ({error.strerror}); set VIEW_DISTILL_CACHE to a writable directory"
        ) from error
    return path


def _lock_path(copy: Path) -> Path:
    """Path of the lock of a copy, complete or incomplete."""
    return copy.with_name(f"{copy.name.removeprefix(TEMPORARY)}.lock")


def _download(bucket: BucketDirectory, objects: Mapping[str, Object], fresh: Path) -> None:
    """Copies objects into a new directory."""
    for name in objects:
        (fresh / name).parent.mkdir(parents=True, exist_ok=True)
    _download_all(bucket, objects, fresh)
    _check_unchanged(bucket, objects)


def _check_unchanged(bucket: BucketDirectory, objects: Mapping[str, Object]) -> None:
    """Checks that the objects are still those of the listing by which the copy is named."""
    there = bucket.objects(os.path.commonpath(list(objects)))
    if changed := [name for name, found in objects.items() if there.get(name) != found]:
        raise TryAgainError(f"{bucket.url}: changed during the copy ({changed[0]}); rerun the same command")


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
            pool.submit(bucket.download, name, fresh / name, size=found.size): name
            for name, found in objects.items()
        }
        try:
            for done in concurrent.futures.as_completed(copying):
                name = copying[done]
                done.result()
                bar.update(objects[name].size)
        except FileNotFoundError as error:
            pool.shutdown(wait=False, cancel_futures=True)
            raise TryAgainError(
                f"{bucket.url}: changed during the copy ({name} was removed); rerun the same command"
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _make_room(root: Path, needed: int, *, limit: int, flag: str) -> None:
    """Removes copies that no process uses, least recently used first, until `needed` bytes fit."""
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
            f"{flag}: a local copy needs {needed:,} bytes in {root}, and copies in use already take {sum(held.values()):,} of the "
            f"{limit:,} bytes of `data_cache_bytes`; raise the limit, or end the processes that use them"
        )
    if needed > (free := shutil.disk_usage(root).free):
        raise UserError(
            f"{flag}: a local copy needs {needed:,} bytes in {root}, where {free:,} are free; free up space, or set "
            "VIEW_DISTILL_CACHE to a directory on a larger disk"
        )


def _last_used(copy: Path) -> float:
    with contextlib.suppress(FileNotFoundError):  # completed or removed by another process
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
    """Yields whether no process uses a copy. If so, the copy is locked during the block."""
    with _lock_path(copy).open("w") as lock:
        yield flock(lock, wait=False)


def copied_teacher(url: str) -> Path:
    """Local copy of a teacher in a bucket: a SavedModel directory or a `.keras` file.

    Raises:
      UserError: there is no teacher, or no space for it.
    """
    parent, _, last = url.rstrip("/").rpartition("/")
    is_file = last.endswith(".keras")
    bucket = BucketDirectory(parent if is_file else url)
    objects = bucket.objects(last if is_file else "")
    if not objects:
        raise UserError(f"`teacher`={url}: not found; expected a SavedModel directory or a .keras file")
    path = local_copy(bucket, objects, flag="`teacher`")
    return path / last if is_file else path


def copied_dataset(name: str, url: str, *, limit: int = DATA_CACHE_BYTES) -> Path:
    """Local copy of one data set of a TFDS data directory in a bucket.

    Args:
      name: `NAME[/CONFIG][:VERSION]`; by default the highest version and the only configuration.
      url: URL of the TFDS data directory.
      limit: see `local_copy`.

    Returns:
      A TFDS data directory.

    Raises:
      UserError: there is no such data set, or it has several configurations.
    """
    bucket = BucketDirectory(url)
    path, _, version = name.partition(":")
    objects = bucket.objects(path)
    found = [n[: -len("/dataset_info.json")] for n in objects if n.endswith("/dataset_info.json")]
    found = [place for place in found if not version or place.rsplit("/", 1)[1] == version]
    if not found:
        there = ", ".join(sorted({n.rsplit("/", 1)[0] for n in objects})) or "no version of it"
        raise UserError(f"`dataset`={name}: not found in `data_dir`={url}, which contains {there}")
    configs = sorted({place.rsplit("/", 1)[0] for place in found})
    if len(configs) > 1:
        raise UserError(
            f"`dataset`={name}: `data_dir`={url} has the configurations {', '.join(configs)}; name one"
        )
    place = max(found, key=_version_key)
    return local_copy(
        bucket,
        {n: o for n, o in objects.items() if n.startswith(f"{place}/")},
        flag="`data_dir`",
        limit=limit,
    )


def _version_key(place: str) -> tuple[int, ...]:
    parts = place.rsplit("/", 1)[1].split(".")
    return tuple(int(part) if part.isdigit() else -1 for part in parts)
