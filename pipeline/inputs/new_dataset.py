"""The directory of a data set in the making: written aside, and published by one rename."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import multiprocessing.pool
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from pipeline.cli.environment import usable_cpus
from pipeline.cli.parser import make_directory
from pipeline.cli.units import bytes_text
from pipeline.errors import UserError
from pipeline.inputs.image_files import Changes
from pipeline.storage.files import move_directory, remove_directory
from pipeline.storage.lock import LOCK_FILE, writer_lock

_IMAGES_AT_ONCE = 128  # read ahead
_In = TypeVar("_In")
_Out = TypeVar("_Out")


@contextlib.contextmanager
def published(data_dir: Path, path: Path) -> Iterator[Path]:
    """Yields a temporary directory; `path` in it is moved to `data_dir / path` unless the context raises.

    Args:
      data_dir: TFDS data directory; created if it does not exist.
      path: relative path of the data set: name, config if any, version.

    Raises:
      UserError: the path exists, or another process is writing it.
    """
    target = data_dir / path
    _check_absent(target, data_dir, path)
    aside = data_dir / f".{'-'.join(path.parts)}.partial"
    make_directory(data_dir, flag="--data_dir")
    aside.mkdir(exist_ok=True)
    with writer_lock(aside, flag="--data_dir"):
        try:
            _check_absent(target, data_dir, path)  # again: another import may have finished
            for leftover in aside.iterdir():  # of an interrupted run
                if leftover.name != LOCK_FILE:
                    remove_directory(leftover)
            yield aside
            target.parent.mkdir(parents=True, exist_ok=True)
            move_directory(aside / path, target)
        finally:
            remove_directory(aside)


def _check_absent(target: Path, data_dir: Path, path: Path) -> None:
    if target.exists():
        raise UserError(f"--data_dir={data_dir}: {path} exists; name another directory, or remove it first")


def progress_bar(total: int, what: str) -> tqdm:
    """A progress bar of images."""
    return tqdm(total=total, unit=" images", desc=what, dynamic_ncols=True)


def in_parallel(function: Callable[[_In], _Out], items: Iterable[_In]) -> Iterator[_Out]:
    """Maps a function over items on all CPUs, in order, with a bounded number of items in memory."""
    rest = iter(items)
    with multiprocessing.pool.ThreadPool(usable_cpus()) as pool:
        while some := list(itertools.islice(rest, _IMAGES_AT_ONCE)):
            yield from pool.map(function, some)


@dataclasses.dataclass
class SizeChange:
    """Numbers and sizes of images before and after `Changes.short_side`."""

    images: int = 0
    scaled: int = 0
    bytes_before: int = 0
    bytes_after: int = 0

    def add(self, before: bytes, after: bytes) -> None:
        """Counts one image."""
        self.images += 1
        self.scaled += before != after
        self.bytes_before += len(before)
        self.bytes_after += len(after)

    def text(self, changes: Changes) -> str:
        """The numbers as a line."""
        larger = self.bytes_after > self.bytes_before
        advice = "; a lower --quality, nearer to that of the originals, makes it smaller" if larger else ""
        return (
            f"short side of {changes.short_side} pixels: {self.scaled:,} of {self.images:,} images scaled down, "
            f"{bytes_text(self.bytes_before)} before, {bytes_text(self.bytes_after)} after{advice}"
        )
