"""Finds out what a precompute has to compute, and tries it out before the first shard."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from pipeline.precomputing import value_range
from pipeline.precomputing.options import PrecomputeOptions
from pipeline.precomputing.reports import found_text, work_text
from pipeline.precomputing.shard_sink import open_sink
from pipeline.precomputing.shard_tasks import damaged_shards, missing_shards
from pipeline.precomputing.store_session import StoreSession, check_space
from pipeline.precomputing.worker import PrecomputeJob, ShardWorker
from pipeline.storage.bucket import is_url
from pipeline.store.identity import DatasetIdentity
from pipeline.store.layout import SPEC_FILE, VIEWS_SPLIT
from pipeline.store.shards import ShardTask


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """The work of a precompute.

    Attributes:
      tasks: all shards that are not published, and published ones to repair.
      to_compute: those of `tasks` that no interrupted run has finished.
      identities: data set identity of each split.
    """

    tasks: list[ShardTask]
    to_compute: list[ShardTask]
    identities: dict[str, DatasetIdentity]


def find_work(session: StoreSession, options: PrecomputeOptions) -> Work:
    """Compares a store with what is requested; prints what earlier runs left.

    Raises:
      UserError: the disk cannot hold the missing shards.
      DataError: the store has another spec, was written from other data, or is damaged.
    """
    session.check(options.spec, repair=options.repair)
    tasks, identities = missing_shards(options, session.path)
    if options.repair:
        tasks = [*_find_damaged(session), *tasks]
    sink = open_sink(options.store, options.spec, lease=session.lease)
    finished = session.adopt_finished([task for task in tasks if not task.sha256], sink)
    if tasks and (text := found_text(finished, tasks, options)):
        print(text, flush=True)
    adopted = set(finished)
    to_compute = [task for task in tasks if task not in adopted]
    if to_compute:
        check_space(to_compute, options)
    return Work(tasks=tasks, to_compute=to_compute, identities=identities)


def _find_damaged(session: StoreSession) -> list[ShardTask]:
    """Repair tasks for the published shards that are damaged; prints them."""
    if not (session.path / SPEC_FILE).exists():
        return []
    damaged = damaged_shards(session.open_store())
    for _, problem in damaged:
        print(f"to be computed again: {problem}")
    if not damaged:
        print("nothing to repair: every published shard matches the manifest")
    return [task for task, _ in damaged]


def make_job(
    session: StoreSession,
    options: PrecomputeOptions,
    identities: dict[str, DatasetIdentity],
    *,
    input_buffer_bytes: int | None = None,
) -> PrecomputeJob:
    """The job of the workers. Paths are absolute, because a worker may run in another directory.

    Args:
      identities: data set identity of each split.
      input_buffer_bytes: used if the options do not state it.
    """
    if options.input_buffer_bytes is not None:
        input_buffer_bytes = options.input_buffer_bytes
    return PrecomputeJob(
        store=_absolute(options.store),
        spec=options.spec.to_json(),
        data_dir=None if options.data_dir is None else _absolute(options.data_dir),
        teacher=_absolute(options.teacher),
        image_cache_bytes=options.image_cache_bytes,
        input_buffer_bytes=input_buffer_bytes,
        data_cache_bytes=options.data_cache_bytes,
        lease=session.lease,
        progress=str(session.path.absolute()),
        eval_datasets=tuple(identity for split, identity in identities.items() if split != VIEWS_SPLIT),
    )


def _absolute(place: str) -> str:
    return place if is_url(place) else str(Path(place).absolute())


def try_worker(worker: ShardWorker, to_compute: list[ShardTask], options: PrecomputeOptions) -> None:
    """Tries a worker on the first views and on labeled images; prints the expected duration.

    Raises:
      UserError: the teacher cannot be used, or its value range is wrong.
      DataError: an image or a logit is invalid.
    """
    seconds_per_batch = worker.try_teacher()
    figures = value_range.measure(worker, options.datasets, options.match)
    if figures is None:
        print("the teacher's value range is not checked, since no accuracy can be computed", flush=True)
    else:
        print(figures.text(), flush=True)
        value_range.check_value_range(figures, assumed=options.assume_value_range)
    worker.check_differs()
    print(work_text(to_compute, seconds_per_batch=seconds_per_batch, options=options), flush=True)
