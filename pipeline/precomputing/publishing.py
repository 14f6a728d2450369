"""Publishes finished shards while workers compute the next ones, on any runner."""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from pipeline.errors import DataError, TryAgainError
from pipeline.precomputing.shard_sink import LocalShardSink, open_sink
from pipeline.precomputing.store_session import StoreSession
from pipeline.precomputing.worker import ShardResult
from pipeline.store.identity import DatasetIdentity
from pipeline.store.layout import VIEWS_SPLIT, split_directory
from pipeline.store.metadata import SplitManifest, load_manifest, publish_metadata, published_lengths
from pipeline.store.metadata_copy import naming
from pipeline.store.shards import ShardInfo, ShardTask
from pipeline.store.spec import Spec

_POLL_SECONDS, _REMOTE_POLL_SECONDS = 0.5, 5.0  # requests to a bucket cost money
_TIME_SHARE = 0.02  # largest share of the time for publishing, which writes the whole manifest each time
_LONGEST_PAUSE = 300.0  # seconds; readers wait for epochs
_PATIENCE = 60.0  # seconds until a network file system shows the files of other machines


def publish_results(
    store: Path,
    spec: Spec,
    *,
    results: Iterable[ShardResult],
    identities: dict[str, DatasetIdentity],
    check: Callable[[ShardTask, ShardInfo], None] | None = None,
) -> list[Path]:
    """Appends finished shards to the published ones. Repaired shards are published already and skipped.

    Args:
      store: directory of the store's metadata.
      results: finished shards in any order.
      identities: data set identity of each split.
      check: compares a shard with its file, see `ShardSink.check`; by default the file in `store`.

    Returns:
      The directories whose metadata changed, in the order in which they were written.

    Raises:
      DataError: an earlier shard is missing, a shard is published with other content, or its file has changed.
    """
    check = check or LocalShardSink(store, spec).check
    by_split: dict[str, list[ShardResult]] = {}
    for result in sorted(results, key=lambda result: result.task.number):
        if not result.task.sha256:
            by_split.setdefault(result.task.split, []).append(result)
    directories: dict[Path, dict[str, SplitManifest]] = {}
    for split, finished in by_split.items():
        directory = split_directory(store, split)
        if directory not in directories:
            directories[directory] = load_manifest(directory, digest=spec.digest())
        before = directories[directory].get(split)
        shards = list(before.shards) if before else []
        for result in finished:
            if _is_next(result, shards, directory):
                check(result.task, result.info)
                shards.append(result.info)
        directories[directory][split] = SplitManifest(dataset=identities[split], shards=tuple(shards))
    # The store's own directory last: its metadata make the store visible.
    changed = sorted(directories, key=lambda directory: directory == store)
    for directory in changed:
        publish_metadata(directory, directories[directory], digest=spec.digest(), codec=spec.make_codec())
    return changed


def _is_next(result: ShardResult, shards: list[ShardInfo], directory: Path) -> bool:
    """Whether a shard follows the published ones; otherwise it is one of them.

    Raises:
      DataError: an earlier shard is missing, or the shard is published with other content.
    """
    number, place = result.task.number, directory / result.task.name
    if number > len(shards):
        raise DataError(f"{place}: is shard {number}, but only {len(shards)} shards precede it")
    if number < len(shards) and shards[number] != result.info:
        raise DataError(
            f"{place}: is published with sha256 {shards[number].sha256[:16]}, but computed with {result.info.sha256[:16]}"
        )
    return number == len(shards)


class Publisher:
    """Publishes finished shards from a thread within the context, and all of them at its end.

    Workers on any runner note finished shards in the store, and the thread polls these notes. Each evaluation split is
    published as a whole. Then, when an epoch is complete, its shards and the finished ones after it are published.

    Args:
      tasks: all shards that are not published yet.
      identities: data set identity of each split.
      fail: called from the thread with an exception of publishing; has to end the work.
    """

    def __init__(
        self,
        session: StoreSession,
        spec: Spec,
        tasks: Iterable[ShardTask],
        identities: dict[str, DatasetIdentity],
        *,
        fail: Callable[[BaseException], None],
    ) -> None:
        self._session, self._spec, self._identities, self._fail = session, spec, identities, fail
        self._sink = open_sink(session.location, spec, lease=session.lease)
        self._waiting: dict[str, collections.deque[ShardTask]] = {}
        for task in tasks:
            if not task.sha256:  # a repaired shard is published
                self._waiting.setdefault(task.split, collections.deque()).append(task)
        self._finished: dict[str, list[ShardResult]] = {split: [] for split in self._waiting}
        self._published = sum(published_lengths(session.path).get(VIEWS_SPLIT, ()))  # training views
        self._pause = _POLL_SECONDS if session.lease is None else _REMOTE_POLL_SECONDS
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def published_epochs(self) -> int:
        """Number of whole epochs that are published."""
        return self._published // self._spec.num_examples

    def __enter__(self) -> Publisher:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        if kind is None:
            self._publish_rest()

    def _watch(self) -> None:
        pause = 0.0
        while not self._ended.wait(pause):
            start = time.monotonic()
            try:
                self.publish()
            except BaseException as error:  # noqa: BLE001  # raised again in the main thread
                self._fail(error)
                return
            pause = max(self._pause, min((time.monotonic() - start) / _TIME_SHARE, _LONGEST_PAUSE))

    def publish(self) -> None:
        """Publishes finished shards that complete a split or an epoch.

        Raises:
          TryAgainError: another run has taken the store over, or the file of a finished shard has changed.
        """
        for split, waiting in self._waiting.items():
            while waiting and (info := self._sink.finished(waiting[0])) is not None:
                result = ShardResult(task=waiting.popleft(), info=info, adopted=True)
                self._finished[split].append(result)
        evaluation = [split for split in self._waiting if split != VIEWS_SPLIT]
        if any(self._waiting[split] for split in evaluation):
            return
        ready = [split for split in [*evaluation, VIEWS_SPLIT] if self._completes_something(split)]
        if results := [result for split in ready for result in self._finished[split]]:
            self._write(results)
        for split in ready:
            self._finished[split] = []

    def _completes_something(self, split: str) -> bool:
        """Whether the finished shards complete the split or another epoch."""
        if not (finished := self._finished.get(split)):
            return False
        last = finished[-1].task
        epochs = (last.first + last.records) // self._spec.num_examples
        return not self._waiting[split] or epochs > self.published_epochs()

    def _write(self, results: list[ShardResult]) -> None:
        session = self._session
        with naming(session.path, session.location):
            changed = publish_results(
                session.path, self._spec, results=results, identities=self._identities, check=self._check
            )
        if session.copy is not None:
            for directory in changed:
                session.copy.publish(directory, before=session.check_lock)
        for task in (result.task for result in results):
            if task.split == VIEWS_SPLIT:
                self._published = task.first + task.records

    def _check(self, task: ShardTask, info: ShardInfo) -> None:
        try:
            self._sink.check(task, info)
        except DataError as error:
            if self._session.lease is None:  # in a bucket, the object's version shows that it has changed
                self._sink.remove(task)
            raise TryAgainError(
                f"{error}; the shard is not published: run the same command again to compute it"
            ) from error

    def _publish_rest(self) -> None:
        self.publish()  # may take minutes: reads every shard that is not published yet
        end = time.monotonic() + _PATIENCE
        while missing := [task for waiting in self._waiting.values() for task in waiting]:
            if time.monotonic() > end:
                raise TryAgainError(
                    f"{self._session.location}: the runner has finished, but {len(missing)} shards are missing, first "
                    f"{missing[0].name}; check that all workers see this store, and run the same command again"
                )
            time.sleep(_POLL_SECONDS)
            self.publish()
