"""Measures the overhead of a precompute of 14 million examples and 300 epochs, and of resuming 64,000 shards.

    python tests/benchmarks/scale.py                          # no images, no teacher; about one minute

Pending shards, order and boxes of a shard, and Beam's graph up to the first shard are the project's own code. A worker
that finishes each shard at once replaces the teacher, so that all shards can be published. The files of the shards have
the right length but no content. Opening one would fail, and every open is counted.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import resource
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.utils.shared import Shared

from pipeline.cli.main import run_command
from pipeline.cli.parser import Parser, positive
from pipeline.pages.statistics import sample_views
from pipeline.pages.summary import find_contents, find_problems
from pipeline.precompute import run_pipeline
from pipeline.precomputing.options import PrecomputeOptions
from pipeline.precomputing.progress import Progress
from pipeline.precomputing.publishing import publish_results
from pipeline.precomputing.shard_tasks import missing_shards
from pipeline.precomputing.store_session import StoreSession
from pipeline.precomputing.worker import VIEWS_SPLIT, PrecomputeJob, ShardResult
from pipeline.store.identity import DatasetIdentity, TeacherIdentity
from pipeline.store.reader import StoreReader
from pipeline.store.shards import ShardInfo, ShardTask, shard_name
from pipeline.store.spec import Spec
from pipeline.views.eval_crop import EvalCrop
from pipeline.views.order import example_of_view
from pipeline.views.policies.inception import Inception
from pipeline.views.render import render_probe

BYTES = 140  # approximate size of a record of `topk:16`


def measured(what: str, work: Callable[[], Any], *, rounds: int = 1) -> Any:
    """Prints the seconds of the fastest round, and the peak allocation of one more round."""
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        out = work()
        seconds.append(time.perf_counter() - started)
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    print(f"{what}: {min(seconds):.2f} s, {peak / 1e6:,.0f} MB", flush=True)
    return out


def make_spec(examples: int) -> Spec:
    """A spec with a synthetic data set."""
    return Spec(
        dataset=DatasetIdentity(
            name="synthetic:1.0.0", split="train", num_examples=examples, fingerprint="0" * 32
        ),
        seed=0,
        policy=Inception(),
        eval_crop=EvalCrop(),
        teacher=TeacherIdentity(fingerprint="0" * 64, value_range="0..1", signature="none", batch_size=64),
        num_classes=21_841,
        codec="topk:16",
        temperature=1.0,
        render_probe=render_probe(),
    )


class NoTeacher:
    """A `ShardWorker` that finishes each shard at once.

    Attributes:
      started, cpu_started: `time.perf_counter` and `process_time` at the start of the first shard; 0 before.
      results: Results of all shards.
    """

    def __init__(self) -> None:
        self.started = 0.0
        self.cpu_started = 0.0
        self.results: list[ShardResult] = []

    def run(self, task: ShardTask) -> ShardResult:
        """Returns the result of a written shard."""
        self.started = self.started or time.perf_counter()
        self.cpu_started = self.cpu_started or time.process_time()
        digest = hashlib.sha256(task.name.encode()).hexdigest()
        info = ShardInfo(
            records=task.records, bytes=BYTES * task.records, sha256=digest, kl=1e-3, max_error=0.1
        )
        self.results.append(ShardResult(task=task, info=info, adopted=False, seconds=1.0))
        return self.results[-1]


def first_shard(spec: Spec, tasks: list[ShardTask]) -> None:
    """Measures order, boxes, flips and ratios of the first shard and of one in the last epoch."""
    for where, task in (("the first shard", tasks[0]), ("a shard of the last epoch", tasks[-100])):
        views = np.arange(task.first, task.first + task.records)
        sizes = np.random.default_rng(0).integers(200, 800, (len(views), 2))
        for name, work in (
            ("order", lambda v=views: example_of_view(v, num_examples=spec.num_examples, seed=0)),
            ("boxes", lambda v=views, s=sizes: spec.policy.draw_boxes(v, seed=0, sizes=s)),
            (
                "flips and ratios",
                lambda v=views: (spec.policy.draw_flips(v, seed=0), spec.policy.draw_ratios(v, seed=0)),
            ),
        ):
            measured(f"{name} of {len(views):,} views, {where}", work)


def run_graph(options: PrecomputeOptions, tasks: list[ShardTask]) -> None:
    """Measures Beam's graph over all shards, to the first shard and to its end, and the publication of all shards."""
    job = PrecomputeJob(
        store=options.store, spec=options.spec.to_json(), data_dir=None, teacher="none", image_cache_bytes=0
    )
    shared, worker = Shared(), NoTeacher()
    shared.acquire(lambda: worker, tag=job)
    started, cpu_started = time.perf_counter(), time.process_time()
    with Progress(Path(options.store), tasks):
        run_pipeline(
            tasks,
            job,
            shared=shared,
            options=PipelineOptions(["--runner=FnApiRunner"]),
        )
    ended = time.perf_counter()
    print(
        f"Beam's graph over {len(tasks):,} shards: {worker.started - started:.2f} s to the first one "
        f"({worker.cpu_started - cpu_started:.2f} s of CPU time), {ended - worker.started:.2f} s "
        "from there to its end, with shards that take no time"
    )
    publish_results(
        Path(options.store),
        options.spec,
        results=worker.results,
        identities={VIEWS_SPLIT: options.spec.dataset},
        check=lambda task, info: None,
    )
    print(f"publishing all of them at once: {time.perf_counter() - ended:.2f} s")


def make_files(store: Path, lengths: list[int]) -> None:
    """Writes sparse files with the lengths of the shards."""
    for number, records in enumerate(lengths):
        with (store / shard_name(VIEWS_SPLIT, number)).open("wb") as file:
            file.truncate(BYTES * records)


def resume(options: PrecomputeOptions) -> None:
    """Measures the work of the precompute and of `inspect` before they write or read a shard."""
    store, opened = Path(options.store), []

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and ".array_record-" in str(arguments[0]):
            opened.append(arguments[0])

    sys.addaudithook(audit)
    longer = dataclasses.replace(options, epochs=options.epochs + 1)
    measured(
        "resuming: spec, sizes of all files", lambda: StoreSession(options.store, store).check(options.spec)
    )
    tasks, _ = measured("resuming: pending shards of one more epoch", lambda: missing_shards(longer, store))
    found = measured("a reader: opening the store", lambda: StoreReader(store))
    contents = measured("inspect: contents", lambda: find_contents(found))
    problems = measured("inspect: sizes of all files", lambda: find_problems(found, checksums=False))
    sampled = measured("inspect: choosing a sample", lambda: sample_views(found.views, seed=0))
    print(
        f"{contents['shards']:,} published shards, {contents['views']:,} views, {len(problems)} incomplete, {len(tasks)} "
        f"pending, {sum(map(len, sampled)):,} sampled; shard files opened: {len(opened)}"
    )


def main(argv: list[str]) -> int:
    """Runs the benchmark."""
    parser = Parser(prog="scale.py")
    parser.add_argument("--examples", type=positive, default=14_000_000)
    parser.add_argument("--epochs", type=positive, default=300)
    parser.add_argument("--views_per_shard", type=positive, default=65_536)
    flags = parser.parse_strictly(argv)
    with tempfile.TemporaryDirectory() as scratch:
        options = PrecomputeOptions(
            is_demo=False,
            store=scratch,
            data_dir=None,
            teacher="none",
            epochs=flags.epochs,
            views_per_shard=flags.views_per_shard,
            image_cache_bytes=0,
            input_buffer_bytes=None,
            data_cache_bytes=0,
            datasets={},
            repair=False,
            assume_value_range=False,
            spec=make_spec(flags.examples),
            loaded=None,  # type: ignore[arg-type]  # no teacher is run
        )
        print(f"peak of the process after its imports: {_peak() / 1e6:,.0f} MB")
        tasks, _ = measured("pending shards", lambda: missing_shards(options, Path(scratch)))
        first_shard(options.spec, tasks)
        StoreSession(scratch, Path(scratch)).write_spec(options.spec)
        print(f"peak of the process so far: {_peak() / 1e6:,.0f} MB")
        run_graph(options, tasks)
        print(f"peak of the process so far: {_peak() / 1e6:,.0f} MB")
        make_files(Path(scratch), [task.records for task in tasks])
        resume(options)
        size = sum(entry.stat().st_size for entry in os.scandir(scratch) if entry.name.endswith(".json"))
        print(f"metadata: {size / 1e6:,.1f} MB")
    return 0


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    run_command(main)
