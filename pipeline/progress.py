"""A progress bar over workers in any process, from what they note beside the store."""

from __future__ import annotations

import contextlib
import threading

from tqdm import tqdm

from pipeline.store.shards import ShardTask
from pipeline.worker import progress_path

_POLL_SECONDS = 0.5


class Progress:
    """A bar over the views of all pending shards, from what the workers note beside the store."""

    def __init__(self, store: str, tasks: list[ShardTask]) -> None:
        self._paths = [progress_path(store, task) for task in tasks]
        self._total = sum(task.records for task in tasks)
        self._ended = threading.Event()
        self._whole = False
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Progress:
        for path in self._paths:  # of a run that died
            path.unlink(missing_ok=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._whole = kind is None
        self._ended.set()
        self._thread.join()
        for path in self._paths:
            path.unlink(missing_ok=True)
        for directory in {path.parent for path in self._paths}:
            with contextlib.suppress(OSError):  # not there, or with notes on shards for the next run
                directory.rmdir()

    def _watch(self) -> None:
        with tqdm(total=self._total, unit=" views", desc="precompute", dynamic_ncols=True) as bar:
            while not self._ended.wait(_POLL_SECONDS):
                self._show(bar)
            self._show(bar)

    def _show(self, bar: tqdm) -> None:
        # Published shards' notes are gone.
        done = self._total if self._whole else 0
        for path in self._paths:
            try:
                done += int(path.read_text() or 0)
            except (OSError, ValueError):  # not begun; or published, and its notes gone
                continue
        if min(done, self._total) > bar.n:
            bar.update(min(done, self._total) - bar.n)
