r"""Runs the teacher once: `python -m pipeline.precompute --runner=DirectRunner`.

Writes seeded augmentation parameters and teacher logits for many augmented epochs into a store. Run the same
command again after a crash and it continues; with more epochs, and the store grows.

    python -m pipeline.precompute --runner=DirectRunner                       # embedded default, about a minute
    python -m pipeline.precompute --runner=DirectRunner --dataset=oxford_flowers102 --data_dir=DIR \
        --teacher=SAVED_MODEL --store=DIR --epochs=50 --recipe=bit            # 1,020 images, a few minutes

This is the only module that imports Beam.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take seconds
    from pipeline.errors import run_module

    run_module("pipeline.precompute")

import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import apache_beam as beam
from apache_beam.metrics import Metrics
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.runner import create_runner
from apache_beam.utils.shared import Shared

from pipeline.dataset import Dataset
from pipeline.errors import DataError, UserError
from pipeline.flags import Parser
from pipeline.options import (
    DEMO_STORE,
    PrecomputeOptions,
    announce_demo,
    check_flags,
    make_parser,
    resolve,
)
from pipeline.progress import Progress
from pipeline.store.files import remove_temporaries, write_text
from pipeline.store.lock import writer_lock
from pipeline.store.metadata import INFO_FILE, SplitManifest, load_manifest, publish_metadata
from pipeline.store.reader import Store
from pipeline.store.shards import MAX_SHARDS, PENDING, ShardTask
from pipeline.store.spec import SPEC_FILE, Spec, differences
from pipeline.worker import (
    VIEWS_SPLIT,
    PrecomputeJob,
    ShardResult,
    ShardWorker,
    split_directory,
)

Identity = dict[str, Any]  # of a data set

_METRICS = "precompute"
_LONG_SHARD_SECONDS = 600  # a lost worker should not cost more than ten teacher minutes


class ComputeShard(beam.DoFn):
    """ShardTask to ShardResult; teacher and data set are held once a process."""

    def __init__(self, job: PrecomputeJob, shared: Shared) -> None:
        self._job = job
        self._shared = shared

    def setup(self) -> None:
        """Loads the teacher, or takes the one that this process has."""
        job = self._job
        self._worker: ShardWorker = self._shared.acquire(lambda: ShardWorker(job), tag=job)

    def process(self, task: ShardTask) -> Iterator[ShardResult]:
        """Writes one shard."""
        result = self._worker.run(task)
        if not result.adopted:
            Metrics.counter(_METRICS, "views").inc(task.records)
            Metrics.counter(_METRICS, "bytes").inc(result.info.bytes)
            for name in ("seconds", "teacher_seconds", "input_seconds"):
                Metrics.counter(_METRICS, name.replace("seconds", "microseconds")).inc(
                    int(getattr(result, name) * 1e6)
                )
        yield result


class PublishStore(beam.DoFn):
    """All ShardResults to the store's metadata: evaluation splits first, the views last."""

    def __init__(self, job: PrecomputeJob, identities: dict[str, Identity]) -> None:
        self._job = job
        self._identities = identities

    def process(self, results: list[ShardResult]) -> Iterable[ShardResult]:
        """Publishes, and gives the results on for the summary."""
        spec = Spec.from_json(self._job.spec, where="the job's spec")
        publish_results(self._job.store, spec, results, self._identities)
        return results


def publish_results(
    store: str, spec: Spec, results: Iterable[ShardResult], identities: dict[str, Identity]
) -> None:
    """Appends finished shards to what is published, and then forgets the notes on them.

    Args:
      store: its directory.
      spec: its spec.
      results: in any order.
      identities: `Dataset.identity()` by split.

    Raises:
      DataError: a shard before one of them is missing, or is published as another.
    """
    by_split: dict[str, list[ShardResult]] = {}
    for result in sorted(results, key=lambda r: r.task.number):
        by_split.setdefault(result.task.split, []).append(result)
    directories: dict[Path, dict[str, SplitManifest]] = {}
    for split, finished in by_split.items():
        directory = split_directory(store, split)
        if directory not in directories:
            directories[directory] = load_manifest(directory, digest=spec.digest())
        before = directories[directory].get(split)
        shards = list(before.shards) if before else []
        for result in finished:
            # What is published already, and the same, is this step run again by its runner.
            if shards[result.task.number : result.task.number + 1] not in ([], [result.info]):
                raise DataError(
                    f"{directory / result.task.name}: published already, and not as it was computed now"
                )
            if result.task.number > len(shards):
                raise DataError(
                    f"{directory / result.task.name}: finished, but only {len(shards)} shards precede it"
                )
            shards[result.task.number :] = [result.info, *shards[result.task.number + 1 :]]
        directories[directory][split] = SplitManifest(dataset=identities[split], shards=tuple(shards))
    # The store's own directory last: with its metadata the store exists.
    for directory in sorted(directories, key=lambda d: d == Path(store)):
        publish_metadata(directory, directories[directory], digest=spec.digest(), codec=spec.make_codec())
        shutil.rmtree(directory / PENDING, ignore_errors=True)


def cut_shards(split: str, *, published: list[int], total: int, views_per_shard: int) -> list[ShardTask]:
    """The shards that are missing: cut from the published end; the last may be short.

    Args:
      split: its name.
      published: lengths of the published shards.
      total: views that there shall be.
      views_per_shard: at most.

    Raises:
      UserError: more shards than five digits can number.
    """
    end, number = sum(published), len(published)
    count = -(-(total - end) // views_per_shard) if total > end else 0
    if number + count > MAX_SHARDS:
        least = -(-(total - end) // max(MAX_SHARDS - number, 1))
        raise UserError(
            f"--views_per_shard={views_per_shard}: {number + count} shards, at most {MAX_SHARDS}; use "
            f"--views_per_shard={least} or more"
        )
    return [
        ShardTask(split=split, number=number + i, first=first, records=min(views_per_shard, total - first))
        for i, first in enumerate(range(end, total, views_per_shard))
    ]


def pending_tasks(options: PrecomputeOptions) -> tuple[list[ShardTask], dict[str, Identity]]:
    """Shards to be written, views last, and the data set identities of their splits.

    Raises:
      DataError: what is published of a split is of another data set.
    """
    store, spec = Path(options.store), options.spec
    identities = {VIEWS_SPLIT: spec.dataset}
    totals = {}
    for split in options.eval_splits:
        dataset = Dataset(spec.dataset["name"], split, data_dir=options.data_dir)
        identities[split], totals[split] = dataset.identity(), dataset.num_examples
    totals[VIEWS_SPLIT] = options.epochs * spec.num_examples
    tasks: list[ShardTask] = []
    for split, total in totals.items():
        directory = split_directory(store, split)
        manifest = load_manifest(directory, digest=spec.digest())
        if split in manifest and (
            lines := differences(
                identities[split], manifest[split].dataset, sides=("here", f"in {directory}")
            )
        ):
            raise DataError(f"{directory}: split {split} was written from other data: {'; '.join(lines)}")
        published = [s.records for s in manifest[split].shards] if split in manifest else []
        tasks += cut_shards(split, published=published, total=total, views_per_shard=options.views_per_shard)
    return tasks, identities


def open_store(path: str) -> Path:
    """Makes the store's directory; leaves the decision on its spec to `claim_store`.

    Raises:
      UserError: something else is there.
    """
    store = Path(path)
    if store.exists() and not store.is_dir():
        raise UserError(f"--store={store}: a file is in the way; name a directory")
    store.mkdir(parents=True, exist_ok=True)
    if not (store / SPEC_FILE).exists() and any(p.name != ".lock" for p in store.iterdir()):
        # Temporaries of a run that died before its spec are ours; anything else is somebody's.
        foreign = [p.name for p in store.iterdir() if not p.name.startswith(".")]
        if foreign:
            raise UserError(
                f"--store={store}: not a store and not empty ({foreign[0]}, ...); name another directory"
            )
    return store


def check_store(store: Path, spec: Spec) -> None:
    """Under the lock: compares the spec that is there, and the published shards' files with the manifest.

    Raises:
      DataError: another spec, or a published shard that is missing or of another size.
    """
    for directory in (store, split_directory(store, "eval")):
        if directory.is_dir():
            remove_temporaries(directory)
    if (store / SPEC_FILE).exists():
        stored = Spec.load(store)
        stored.check_renderer()
        spec.check_same(stored, store=str(store))
        if (store / INFO_FILE).exists():
            Store(store).check_files()


def claim_store(store: Path, spec: Spec) -> None:
    """Writes the spec, once teacher and flags are known to work: a refused run must not claim the store."""
    if not (store / SPEC_FILE).exists():
        write_text(store / SPEC_FILE, spec.to_json())
    split_directory(store, "eval").mkdir(exist_ok=True)


def beam_options(arguments: list[str], parser: Parser) -> PipelineOptions:
    """Beam's options from the flags that are not ours.

    Raises:
      UserError: a flag that no Beam option class knows; Beam itself would only warn and drop it.
    """
    theirs = Parser(prog="beam", add_help=False, conflict_handler="resolve")
    for options in [PipelineOptions, *_subclasses(PipelineOptions)]:
        if "_add_argparse_args" in options.__dict__:
            options._add_argparse_args(theirs)
    known, unknown = theirs.parse_known_args(arguments)
    if unknown:
        parser.refuse(unknown, also=theirs.flag_names())
    try:
        create_runner(known.runner or "DirectRunner")
    except (ValueError, ImportError, AttributeError) as error:
        raise UserError(f"--runner={known.runner}: {str(error).splitlines()[0]}") from error
    return PipelineOptions(arguments)


def _subclasses(cls: type) -> list[type]:
    out: list[type] = []
    child: type
    for child in cls.__subclasses__():
        out.append(child)
        out.extend(_subclasses(child))
    return out


def run_pipeline(
    tasks: list[ShardTask],
    job: PrecomputeJob,
    identities: dict[str, Identity],
    *,
    shared: Shared,
    options: PipelineOptions,
) -> dict[str, int]:
    """Runs the Beam graph; returns its counters by name."""
    pipeline = beam.Pipeline(options=options)
    _ = (
        pipeline
        | "CreatePendingShards" >> beam.Create(tasks)
        | "Reshuffle" >> beam.Reshuffle()
        # ShardTask
        | "ComputeShard" >> beam.ParDo(ComputeShard(job, shared))
        # ShardResult
        | "CollectShards" >> beam.combiners.ToList()
        # [ShardResult], all of them
        | "PublishStore" >> beam.ParDo(PublishStore(job, identities))
    )
    result = pipeline.run()
    result.wait_until_finish()
    counters = result.metrics().query()["counters"]
    return {c.key.metric.name: c.result for c in counters if c.key.metric.namespace == _METRICS}


def describe_plan(tasks: list[ShardTask], *, seconds_a_batch: float, options: PrecomputeOptions) -> str:
    """One line before the work: how much there is, and whether a shard is too long to lose."""
    views = sum(task.records for task in tasks)
    rate = int(options.spec.teacher["batch_size"]) / seconds_a_batch
    longest = max(task.records for task in tasks) / rate
    line = f"{views:,} views in {len(tasks)} shards; teacher alone: {rate:,.0f} views/s, {views / rate / 60:,.1f} min"
    if longest > _LONG_SHARD_SECONDS:
        fitting = max(int(_LONG_SHARD_SECONDS * rate), 1)
        line += (
            f"\nA shard takes {longest / 60:.0f} teacher minutes, and a lost worker costs as much; "
            f"--views_per_shard={fitting} would take ten"
        )
    return line


def summarize(store: str, spec: Spec, counters: dict[str, int], seconds: float) -> str:
    """The lines at the end."""
    views = load_manifest(Path(store), digest=spec.digest())[VIEWS_SPLIT]
    cost = views.fidelity()
    text = (
        f"store: {store}: {views.records:,} views ({views.records // spec.num_examples} epochs of "
        f"{spec.num_examples:,} examples), {views.bytes / 1e6:,.1f} MB, {views.bytes / views.records:.0f} bytes a view\n"
        f"codec {spec.codec}: mean KL {cost['mean_kl']:.2e} at T={spec.temperature:g}, largest logit error "
        f"{cost['max_logit_error']:.2e}"
    )
    if written := counters.get("views", 0):
        spent = max(counters["microseconds"], 1)
        text += (
            f"\nthis run: {written:,} views in {seconds:.1f} s, {written / seconds:,.0f} views/s; of a worker's time "
            f"{counters['teacher_microseconds'] / spent:.0%} in the teacher, "
            f"{counters['input_microseconds'] / spent:.0%} waiting for crops"
        )
    return text


def check_space(tasks: list[ShardTask], options: PrecomputeOptions) -> None:
    """Refuses a run that the disk cannot hold, before it begins."""
    codec = options.spec.make_codec()
    needed = sum(task.records for task in tasks) * (codec.dtype.itemsize * codec.num_classes + 16)
    free = shutil.disk_usage(options.store).free
    if needed > free:
        raise UserError(
            f"--store={options.store}: about {needed / 1e6:,.1f} MB are needed, {free / 1e6:,.1f} MB are free there"
        )


def main(argv: list[str]) -> int:
    """The command; see the module's docstring."""
    parser = make_parser()
    flags, rest = parser.parse_known_args(argv)
    runner_options = beam_options(rest, parser)
    is_demo = announce_demo(flags)
    check_flags(flags)
    store = open_store(flags.store or DEMO_STORE)
    options = resolve(flags, is_demo=is_demo)
    with writer_lock(store):
        check_store(store, options.spec)
        tasks, identities = pending_tasks(options)
        if not tasks:
            print(f"nothing to do: {options.epochs} epochs or more are published")
            print(summarize(options.store, options.spec, {}, 0.0))
            return 0
        check_space(tasks, options)
        job = PrecomputeJob(
            store=options.store,
            spec=options.spec.to_json(),
            data_dir=options.data_dir,
            teacher=options.teacher,
            image_cache_bytes=options.image_cache_bytes,
        )
        shared = Shared()
        worker = shared.acquire(lambda: ShardWorker(job), tag=job)
        print(describe_plan(tasks, seconds_a_batch=worker.warm_up(), options=options), flush=True)
        claim_store(store, options.spec)
        begun = time.monotonic()
        with Progress(options.store, tasks):
            counters = run_pipeline(tasks, job, identities, shared=shared, options=runner_options)
        print(summarize(options.store, options.spec, counters, time.monotonic() - begun))
    return 0
