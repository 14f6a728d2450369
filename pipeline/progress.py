"""A progress bar over workers in any process, from what they note beside the store."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from pipeline.store.layout import PENDING, split_directory
from pipeline.store.shards import ShardTask
from pipeline.worker import progress_name

_POLL_SECONDS = 0.5


class Progress:
    """A bar over the views of all pending shards, from what the workers note beside the store.

    Of a large store there are tens of thousands: directories are listed, and notes on finished shards read once.
    """

    def __init__(self, store: Path, tasks: list[ShardTask]) -> None:
        directories = {
            split: split_directory(store, split) / PENDING for split in {task.split for task in tasks}
        }
        # Text: a path object each would take seconds.
        self._records = {f"{directories[task.split]}/{progress_name(task)}": task.records for task in tasks}
        self._directories = set(directories.values())
        self._total = sum(self._records.values())
        self._finished: set[str] = set()
        self._ended = threading.Event()
        self._whole = False
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Progress:
        self._remove_notes()  # of a run that died
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._whole = kind is None
        self._ended.set()
        self._thread.join()
        self._remove_notes()
        for directory in self._directories:
            with contextlib.suppress(OSError):  # not there, or with notes on shards for the next run
                directory.rmdir()

    def _notes(self) -> Iterator[str]:
        """Paths of the notes that are there."""
        for directory in self._directories:
            with contextlib.suppress(OSError):  # not there yet, or published and gone
                names = os.listdir(directory)  # noqa: PTH208  # a path object each would take ten times as long
                yield from filter(self._records.__contains__, (f"{directory}/{name}" for name in names))

    def _remove_notes(self) -> None:
        for path in self._notes():
            Path(path).unlink(missing_ok=True)

    def _watch(self) -> None:
        with tqdm(total=self._total, unit=" views", desc="precompute", dynamic_ncols=True) as bar:
            while not self._ended.wait(_POLL_SECONDS):
                self._show(bar)
            self._show(bar)

    def _show(self, bar: tqdm) -> None:
        begun = 0
        for path in self._notes():
            if path in self._finished:
                continue
            try:
                count = int(Path(path).read_text() or 0)
            except (OSError, ValueError):  # being written; or published, and its notes gone
                continue
            if count == self._records[path]:
                self._finished.add(path)
            else:
                begun += count
        done = begun + sum(self._records[path] for path in self._finished)
        # Published shards' notes are gone.
        done = self._total if self._whole else min(done, self._total)
        if done > bar.n:
            bar.update(done - bar.n)
