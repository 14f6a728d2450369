"""Publishes shards: each epoch as its shards are finished, while workers go on with the next ones; without Beam."""

from __future__ import annotations

import collections
import functools
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from pipeline.errors import DataError, TryAgainError
from pipeline.precomputing.shard_sink import LocalShardSink, open_sink
from pipeline.precomputing.store_session import StoreSession
from pipeline.precomputing.worker import ShardResult
from pipeline.storage.lease import check_lease
from pipeline.store.identity import DatasetIdentity
from pipeline.store.layout import VIEWS_SPLIT, split_directory
from pipeline.store.metadata import SplitManifest, load_manifest, publish_metadata, published_lengths
from pipeline.store.metadata_copy import naming
from pipeline.store.shards import ShardInfo, ShardTask
from pipeline.store.spec import Spec

_POLL_SECONDS, _REMOTE_POLL_SECONDS = 0.5, 5.0  # a bucket counts its requests
_SHARE = 0.02  # of the time that publishing may take: a manifest is written as a whole
_LONGEST_PAUSE = 300.0  # seconds; readers wait for epochs
_PATIENCE = 60.0  # seconds in which a file system over the network shows what another machine wrote


def publish_results(
    store: Path,
    spec: Spec,
    results: Iterable[ShardResult],
    identities: dict[str, DatasetIdentity],
    *,
    check: Callable[[ShardTask, ShardInfo], None] | None = None,
) -> list[Path]:
    """Appends finished shards to what is published. Repaired ones are published already.

    Args:
      store: directory of its metadata.
      spec: its spec.
      results: in any order.
      identities: `Dataset.identity()` by split.
      check: compares a shard with the file that is there, see `ShardSink.check`; by default in `store`.

    Returns:
      The directories whose metadata changed, in the order in which they were written.

    Raises:
      DataError: a shard before one of them is missing, or is published as another, or is not there as it was written.
    """
    check = check or LocalShardSink(store, spec.digest()).check
    by_split: dict[str, list[ShardResult]] = {}
    for result in sorted(results, key=lambda r: r.task.number):
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
            task, place = result.task, directory / result.task.name
            if task.number > len(shards):
                raise DataError(f"{place}: finished, but only {len(shards)} shards precede it")
            if task.number == len(shards):
                check(task, result.info)
                shards.append(result.info)
            elif shards[task.number] != result.info:
                raise DataError(f"{place}: published already, and not as it was computed now")
        directories[directory][split] = SplitManifest(dataset=identities[split], shards=tuple(shards))
    # The store's own directory last: with its metadata the store exists.
    changed = sorted(directories, key=lambda directory: directory == store)
    for directory in changed:
        publish_metadata(directory, directories[directory], digest=spec.digest(), codec=spec.make_codec())
    return changed


class Publisher:
    """Within the context, a thread publishes what workers finish; they note it in the store, on any runner.

    Evaluation splits come first, each as a whole. Then, as soon as an epoch is complete, the shards up to there and
    those finished beyond. At the end of the context everything is published.

    Args:
      session: of the store, whose lock is held.
      spec: of the store.
      tasks: all shards that are not published yet.
      identities: `Dataset.identity()` by split.
      fail: called in the thread with what publishing raises; it has to end the work.
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
        self._sink = open_sink(session.location, digest=spec.digest(), lease=session.lease)
        self._waiting: dict[str, collections.deque[ShardTask]] = {}
        for task in tasks:
            if not task.sha256:  # a repaired shard is published
                self._waiting.setdefault(task.split, collections.deque()).append(task)
        self._finished: dict[str, list[ShardResult]] = {split: [] for split in self._waiting}
        self._published = sum(published_lengths(session.path).get(VIEWS_SPLIT, ()))  # training views
        self._pause = _POLL_SECONDS if session.lease is None else _REMOTE_POLL_SECONDS
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @property
    def epochs(self) -> int:
        """Whole epochs that are published."""
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
            begun = time.monotonic()
            try:
                self.publish()
            except BaseException as error:  # noqa: BLE001  # raised again where the work is
                self._fail(error)
                return
            pause = max(self._pause, min((time.monotonic() - begun) / _SHARE, _LONGEST_PAUSE))

    def publish(self) -> None:
        """Publishes what is finished, as far as it makes a split or an epoch complete.

        Raises:
          TryAgainError: another run has taken the store over, or a shard is not there as it was written.
        """
        for split, waiting in self._waiting.items():
            while waiting and (info := self._sink.finished(waiting[0])) is not None:
                result = ShardResult(task=waiting.popleft(), info=info, adopted=True)
                self._finished[split].append(result)
        evaluation = [split for split in self._waiting if split != VIEWS_SPLIT]
        if any(self._waiting[split] for split in evaluation):
            return
        ready = [split for split in [*evaluation, VIEWS_SPLIT] if self._is_worth(split)]
        if results := [result for split in ready for result in self._finished[split]]:
            self._write(results)
        for split in ready:
            self._finished[split] = []

    def _is_worth(self, split: str) -> bool:
        """Whether the finished shards of a split give readers more than they have."""
        if not (finished := self._finished.get(split)):
            return False
        last = finished[-1].task
        return (
            not self._waiting[split] or (last.first + last.records) // self._spec.num_examples > self.epochs
        )

    def _write(self, results: list[ShardResult]) -> None:
        session = self._session
        with naming(session.path, session.location):
            changed = publish_results(session.path, self._spec, results, self._identities, check=self._check)
        if session.copy is not None and session.lease is not None:
            held = functools.partial(check_lease, session.copy.bucket, session.lease)
            for directory in changed:
                session.copy.publish(directory, before=held)
        for task in (result.task for result in results):
            if task.split == VIEWS_SPLIT:
                self._published = task.first + task.records

    def _check(self, task: ShardTask, info: ShardInfo) -> None:
        try:
            self._sink.check(task, info)
        except DataError as error:
            if self._session.lease is None:  # in a bucket, its version says that it is another
                self._sink.remove(task)
            raise TryAgainError(
                f"{error}; it is not published: run the same command again to compute it anew"
            ) from error

    def _publish_rest(self) -> None:
        self.publish()  # reads what is not published yet: minutes, of large shards
        end = time.monotonic() + _PATIENCE
        while missing := [task for waiting in self._waiting.values() for task in waiting]:
            if time.monotonic() > end:
                raise TryAgainError(
                    f"{self._session.location}: {len(missing)} shards are not finished, though the runner says so, "
                    f"{missing[0].name} first; does every worker see this store? Run the same command again"
                )
            time.sleep(_POLL_SECONDS)
            self.publish()
