"""Progress of a precompute: workers in any process write notes, and the command shows them as a progress bar."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from pipeline.cli.units import counted
from pipeline.store.layout import PENDING, VIEWS_SPLIT, split_directory
from pipeline.store.shards import ShardTask

_POLL_SECONDS = 0.5
_NOTE_SECONDS = 0.5


def progress_name(task: ShardTask) -> str:
    """File name of the progress note on a shard."""
    return f"{task.name}.progress"


class ProgressNote:
    """The number of finished views of a shard, in a file that the command reads.

    Args:
      directory: store, or copy of its metadata; nothing is written where this machine has no such directory.
    """

    def __init__(self, directory: str | Path, task: ShardTask) -> None:
        self._records, self._done, self._written = task.records, 0, 0.0
        self._path: Path | None = None
        if Path(directory).is_dir():
            self._path = split_directory(directory, task.split) / PENDING / progress_name(task)
            self._path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, views: int) -> None:
        """Adds finished views; writes the file at most every half second, and with the last view."""
        self._done += views
        now = time.monotonic()
        if self._path is not None and (now - self._written >= _NOTE_SECONDS or self._done == self._records):
            self._path.write_text(str(self._done))
            self._written = now


def split_records(tasks: Iterable[ShardTask]) -> dict[str, int]:
    """Number of records per split, with the training views last."""
    out: dict[str, int] = {}
    for task in tasks:
        out[task.split] = out.get(task.split, 0) + task.records
    views = out.pop(VIEWS_SPLIT, 0)
    return out | {VIEWS_SPLIT: views} if views else out


def records_text(records: dict[str, int]) -> str:
    """Counts per split, such as `51 views and evaluation crops of test (7)`."""
    crops = ", ".join(f"{split} ({count:,})" for split, count in records.items() if split != VIEWS_SPLIT)
    parts = [counted(records[VIEWS_SPLIT], "view")] if VIEWS_SPLIT in records else []
    return " and ".join([*parts, f"evaluation crops of {crops}"] if crops else parts)


class Progress:
    """A progress bar over all missing shards.

    The bar counts images: a training view and an evaluation crop cost the teacher the same. Counts per split and the number
    of published epochs follow it. A large store has tens of thousands of shards, so directories are listed, and notes on
    finished shards are read only once.

    Args:
      store: directory of the store, or of the copy of its metadata.
      tasks: missing shards.
      published_epochs: returns the number of published epochs, if it is to be shown.
    """

    def __init__(
        self, store: Path, tasks: list[ShardTask], published_epochs: Callable[[], int] | None = None
    ) -> None:
        directories = {
            split: split_directory(store, split) / PENDING for split in {task.split for task in tasks}
        }
        # Text: one path object per shard would take seconds.
        self._tasks = {f"{directories[task.split]}/{progress_name(task)}": task for task in tasks}
        self._directories = set(directories.values())
        self._totals = split_records(tasks)
        self._published_epochs = published_epochs
        self._finished: set[str] = set()
        self._done = dict.fromkeys(self._totals, 0)  # records of finished shards
        self._ended = threading.Event()
        self._complete = False
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Progress:
        self._remove_notes()  # of a run that died
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._complete = kind is None
        self._ended.set()
        self._thread.join()
        self._remove_notes()
        for directory in self._directories:
            with contextlib.suppress(OSError):  # absent, or with notes on shards for the next run
                directory.rmdir()

    def _notes(self) -> Iterator[str]:
        """Paths of the existing notes."""
        for directory in self._directories:
            with contextlib.suppress(OSError):  # not there yet
                names = os.listdir(directory)  # noqa: PTH208  # path objects would take ten times as long
                yield from filter(self._tasks.__contains__, (f"{directory}/{name}" for name in names))

    def _remove_notes(self) -> None:
        for path in self._notes():
            Path(path).unlink(missing_ok=True)

    def _watch(self) -> None:
        total = sum(self._totals.values())
        loading = "workers are loading the teacher and the data set"
        with tqdm(total=total, unit=" images", desc="precompute", dynamic_ncols=True, postfix=loading) as bar:
            while not self._ended.wait(_POLL_SECONDS):
                self._show(bar)
            self._show(bar)
            if self._complete:  # the last epochs are published after this
                bar.set_postfix_str(self._text(self._totals))

    def _show(self, bar: tqdm) -> None:
        done = self._totals if self._complete else self._count()
        if (count := sum(done.values())) > bar.n:
            bar.set_postfix_str(self._text(done), refresh=False)
            bar.update(count - bar.n)

    def _text(self, done: dict[str, int]) -> str:
        parts = [f"{split} {done[split]:,}/{total:,}" for split, total in self._totals.items()]
        if self._published_epochs is not None and VIEWS_SPLIT in self._totals and not self._complete:
            parts.append(f"{counted(self._published_epochs(), 'epoch')} published")
        return ", ".join(parts)

    def _count(self) -> dict[str, int]:
        """Finished records per split."""
        done = dict(self._done)
        for path in self._notes():
            if path in self._finished:
                continue
            task = self._tasks[path]
            try:
                count = int(Path(path).read_text() or 0)
            except (OSError, ValueError):  # being written
                continue
            if count == task.records:
                self._finished.add(path)
                self._done[task.split] += count
            done[task.split] += min(count, task.records)
        return done
