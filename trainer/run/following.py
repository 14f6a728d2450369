"""`--follow`: a run trains on the epochs that are published, and waits for more while the store is being written.

The run waits between two calls of `fit`, in Python: a signal ends it there as it does between two steps, and nothing is
lost, because a checkpoint is saved first. Steps, views, rates and evaluations are those of a run on the finished store.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from pipeline.errors import TryAgainError, UnpublishedError, UserError
from pipeline.storage.cache import SHARD_CACHE_BYTES
from pipeline.storage.writer_watch import WriterWatch
from pipeline.store.reader import Store
from trainer.config.run_length import RunLength
from trainer.distribution.workers import Workers

POLL_SECONDS = 2.0


def wait_for_store(location: str, *, shard_cache_bytes: int = SHARD_CACHE_BYTES) -> Store:
    """Opens a store once its first epoch is published.

    Raises:
      UserError: nothing is published, and no process writes the store.
      TryAgainError: the process that wrote it has ended before its first epoch.
    """
    watch, announced = WriterWatch(location), False
    while True:
        written = watch.is_written()  # before the look, which sees what the writer has published last
        try:
            return Store(location, shard_cache_bytes=shard_cache_bytes)
        except UnpublishedError as error:
            if not written and announced:
                raise TryAgainError(
                    f"--follow: --store={location}: no process writes it any more, and no epoch is published; continue the "
                    "precompute, then run the same command again"
                ) from error
            if not written:
                raise UserError(
                    f"{error}; --follow waits for a precompute that holds the store: start the precompute first"
                ) from error
        if not announced:
            print(f"--follow: waiting for the first epoch of {location}", flush=True)
            announced = True
        time.sleep(POLL_SECONDS)


class Following:
    """Says how far a run can go, and waits where it cannot go on.

    Args:
      store: to train on; its readers see what is published later.
      length: of the run.
      steps_per_execution: steps that are handed to the device at once.
      interval: steps between evaluations.
      workers: of the run, which wait for each other's view of the store.
    """

    def __init__(
        self, store: Store, *, length: RunLength, steps_per_execution: int, interval: int, workers: Workers
    ) -> None:
        self._store, self._length, self._workers = store, length, workers
        self._execution, self._interval = steps_per_execution, interval
        self._watch = WriterWatch(store.location)

    def _available(self, step: int) -> int:
        """One past the last step that can be done now, where executions are cut as on a finished store."""
        steps = min(self._store.views.num_records // self._length.batch_size, int(self._length.steps))
        if steps == self._length.steps:
            return steps
        begin = max(step, steps // self._interval * self._interval)
        return begin + (steps - begin) // self._execution * self._execution

    def wait(self, step: int, *, pause: Callable[[str], None]) -> int:
        """One past the last step that can be done, after `step`; waits until there is one.

        Args:
          step: finished steps, fewer than the run's.
          pause: called before the run waits and each time it looks again, with a line on what it waits for; may end it.

        Raises:
          TryAgainError: no process writes the store any more.
        """
        num_examples = self._length.num_examples
        epochs = -(-int(self._length.steps) * self._length.batch_size // num_examples)
        while True:
            written = self._workers.gather(int(self._watch.is_written())).min()
            self._store.refresh()
            if (stop := int(self._workers.gather(self._available(step)).min())) > step:
                return stop
            pause(f"waiting for epoch {self._store.epochs + 1:,} of {epochs:,}")
            if not written:
                raise TryAgainError(
                    f"--follow: --store={self._store.location}: no process writes it any more, and {self._store.epochs:,} "
                    f"of the {epochs:,} epochs of this run are published; the run is saved at step {step:,}: continue the "
                    "precompute, then run the same command again"
                )
            time.sleep(POLL_SECONDS)
