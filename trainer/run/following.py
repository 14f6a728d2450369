"""`--follow`: trains on published epochs, and waits for more while the precompute is running.

The run waits between two calls of `fit`, after saving a checkpoint, so that a signal ends it there without loss. Steps, views,
learning rates and evaluations are the same as on the finished store.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from pipeline.errors import TryAgainError, UnpublishedError, UserError
from pipeline.storage.cache import SHARD_CACHE_BYTES
from pipeline.storage.writer_watch import WriterWatch
from pipeline.store.reader import StoreReader
from pipeline.store.view_store import ViewStore
from trainer.config.run_length import RunLength
from trainer.distribution.workers import Workers

POLL_SECONDS = 2.0


def wait_for_store(location: str, *, shard_cache_bytes: int = SHARD_CACHE_BYTES) -> StoreReader:
    """Opens a store once its first epoch is published.

    Raises:
      UserError: nothing is published, and no process is writing the store.
      TryAgainError: the process that was writing the store ended before the first epoch.
    """
    watch, announced = WriterWatch(location), False
    while True:
        written = watch.is_written()  # before opening, which then sees everything that the writer published
        try:
            return StoreReader(location, shard_cache_bytes=shard_cache_bytes)
        except UnpublishedError as error:
            if not written and announced:
                raise TryAgainError(
                    f"--follow: no epoch of --store={location} is published, and its precompute has ended; continue the "
                    "precompute, then run the same command again"
                ) from error
            if not written:
                raise UserError(
                    f"{error}; --follow needs a running precompute: start the precompute first"
                ) from error
        if not announced:
            print(f"--follow: waiting for the first epoch of {location}", flush=True)
            announced = True
        time.sleep(POLL_SECONDS)


class Following:
    """Determines how far a run can train, and waits for more views.

    Args:
      store: store to train on; its readers see views that are published later.
      interval: steps between evaluations.
    """

    def __init__(
        self,
        store: ViewStore,
        *,
        length: RunLength,
        steps_per_execution: int,
        interval: int,
        workers: Workers,
    ) -> None:
        self._store, self._length, self._workers = store, length, workers
        self._execution, self._interval = steps_per_execution, interval
        self._watches = [WriterWatch(part.location) for part in store.stores]

    def _available(self, step: int) -> int:
        """One past the last step with published views, at an end of an execution as on the finished store."""
        steps = min(self._store.views.num_records // self._length.batch_size, int(self._length.steps))
        if steps == self._length.steps:
            return steps
        begin = max(step, steps // self._interval * self._interval)
        return begin + (steps - begin) // self._execution * self._execution

    def wait(self, step: int, *, pause: Callable[[str], None]) -> int:
        """Waits until the views of a step after `step` are published; returns one past the last such step.

        Args:
          step: completed steps, fewer than the run's.
          pause: called with a description before waiting and at each poll; may end the run.

        Raises:
          TryAgainError: no process is writing the store any more.
        """
        num_examples = self._length.num_examples
        epochs = -(-int(self._length.steps) * self._length.batch_size // num_examples)
        while True:
            seen = [watch.is_written() for watch in self._watches]  # before reading what they published
            self._store.refresh()
            # The shortest store limits the run, so each one that is too short must grow.
            growing = all(
                alive or part.views.num_records >= int(self._length.steps) * self._length.batch_size
                for part, alive in zip(self._store.stores, seen, strict=True)
            )
            written = self._workers.gather(int(growing)).min()
            if (stop := int(self._workers.gather(self._available(step)).min())) > step:
                return stop
            pause(f"waiting for epoch {self._store.epochs + 1:,} of {epochs:,}")
            if not written:
                raise TryAgainError(
                    f"--follow: the precompute of --store={self._store.location} has ended with {self._store.epochs:,} of the "
                    f"{epochs:,} epochs of this run, which is saved at step {step:,}; continue the precompute, then run the same "
                    "command again"
                )
            time.sleep(POLL_SECONDS)
