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
    from pipeline.cli.main import run_module

    run_module("pipeline.precompute", flags="pipeline.flags.precompute")

import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import apache_beam as beam
from apache_beam.metrics import Metrics
from apache_beam.options.pipeline_options import DirectOptions, PipelineOptions, StandardOptions
from apache_beam.options.pipeline_options_validator import PipelineOptionsValidator
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.runners.runner import PipelineRunner, create_runner
from apache_beam.transforms.environments import SubprocessSDKEnvironment
from apache_beam.utils.shared import Shared

from pipeline.cli.choices import DEMO_STORE
from pipeline.cli.environment import usable_cpus, usable_memory
from pipeline.cli.parser import Parser
from pipeline.cli.units import counted
from pipeline.errors import UserError
from pipeline.errors.causes import first_line
from pipeline.flags.beam import DEFAULT_RUNNER, LOCAL_RUNNERS
from pipeline.flags.precompute import announce_demo, make_parser, parse
from pipeline.pages.figures import codec_cost_text
from pipeline.precomputing import beam_worker, value_range
from pipeline.precomputing.accuracy import SplitAccuracy, accuracy_text, record_accuracy
from pipeline.precomputing.options import PrecomputeOptions, describe_eval_splits, resolve
from pipeline.precomputing.progress import Progress, records_text, split_records
from pipeline.precomputing.publishing import Publisher
from pipeline.precomputing.services import service_failure
from pipeline.precomputing.shard_sink import open_sink
from pipeline.precomputing.shard_tasks import SHARD_SECONDS, damaged_tasks, pending_tasks
from pipeline.precomputing.store_session import StoreSession, check_space, open_session, prepare_directory
from pipeline.precomputing.worker import PrecomputeJob, ShardWorker
from pipeline.storage.bucket import is_url
from pipeline.store.identity import DatasetIdentity
from pipeline.store.layout import SPEC_FILE, VIEWS_SPLIT
from pipeline.store.metadata import load_manifest
from pipeline.store.reader import Store
from pipeline.store.shards import ShardTask
from pipeline.store.spec import Spec

_METRICS = "precompute"


# A ShardTask as Beam ships it, its fields in their order: plain tuples are not pickled one by one, and of a large store
# there are tens of thousands before the first shard is begun.
Element = tuple[str, int, int, int, str | None]


def to_element(task: ShardTask) -> Element:
    """The task as a plain tuple."""
    return task.split, task.number, task.first, task.records, task.sha256


def from_element(element: Element) -> ShardTask:
    """The task that a tuple was made of."""
    split, number, first, records, sha256 = element
    return ShardTask(split=split, number=number, first=first, records=records, sha256=sha256)


class ComputeShard(beam.DoFn):
    """Writes the shard of a ShardTask's tuple and notes it; teacher and data set are held once a process."""

    def __init__(self, job: PrecomputeJob, shared: Shared) -> None:
        self._job = job
        self._shared = shared

    def setup(self) -> None:
        """Loads the teacher, or takes the one that this process has."""
        job = self._job
        self._worker: ShardWorker = self._shared.acquire(lambda: ShardWorker(job), tag=job)

    def process(self, element: Element) -> Iterator[str]:
        """Writes one shard, which the command finds by its note; yields its name."""
        task = from_element(element)
        result = self._worker.run(task)
        if not result.adopted:
            Metrics.counter(_METRICS, "views").inc(task.records)
            Metrics.counter(_METRICS, "bytes").inc(result.info.bytes)
            for name in ("seconds", "teacher_seconds", "input_seconds"):
                Metrics.counter(_METRICS, name.replace("seconds", "microseconds")).inc(
                    int(getattr(result, name) * 1e6)
                )
        yield task.name


def beam_options(arguments: list[str], parser: Parser) -> PipelineOptions:
    """Beam's options from the flags that are not ours.

    Raises:
      UserError: a flag that no Beam option class knows; Beam itself would only warn and drop it.
    """
    # The runner first: one that is named by its module, as Dask's is, brings options of its own.
    asked = Parser(prog="beam", add_help=False)
    asked.add_argument("--runner", default="DirectRunner")
    name = asked.parse_known_args(arguments)[0].runner
    try:
        create_runner(name)
    except (ValueError, ImportError, AttributeError) as error:
        raise UserError(f"--runner={name}: {first_line(error)}") from error
    theirs = Parser(prog="beam", add_help=False, conflict_handler="resolve")
    for options in [PipelineOptions, *_subclasses(PipelineOptions)]:
        if "_add_argparse_args" in options.__dict__:
            options._add_argparse_args(theirs)
    _, unknown = theirs.parse_known_args(arguments)
    if unknown:
        parser.refuse(unknown, also=theirs.flag_names())
    out = PipelineOptions(arguments)
    if mistakes := PipelineOptionsValidator(out, create_runner(name)).validate():
        raise UserError(f"--runner={name}: {'; '.join(' '.join(str(line).split()) for line in mistakes)}")
    return out


def make_runner(options: PipelineOptions) -> PipelineRunner:
    """The runner that `--runner` names; its worker processes, if it is the one that starts any here, are ours."""
    runner = create_runner(options.get_all_options()["runner"] or "DirectRunner")
    direct = options.view_as(DirectOptions)
    if isinstance(runner, FnApiRunner) and direct.direct_running_mode == "multi_processing":
        # Beam's shell would outlive a Ctrl-C by a traceback.
        command = f"exec {shlex.quote(sys.executable)} -m {beam_worker.__name__}"
        runner = FnApiRunner(SubprocessSDKEnvironment.from_command_string(command))
        direct.direct_running_mode = None  # it would set Beam's own command
    return runner


def buffer_share(options: PipelineOptions) -> int | None:
    """`--input_buffer_bytes` where a machine's worker processes share it; None where there is one process."""
    direct = options.view_as(DirectOptions)
    if direct.direct_running_mode != "multi_processing":
        return None
    return usable_memory() // 4 // (direct.direct_num_workers or usable_cpus())


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
    *,
    shared: Shared,
    options: PipelineOptions,
) -> dict[str, int] | None:
    """Runs the Beam graph; returns its counters by name, or None if the runner has none."""
    pipeline = beam.Pipeline(make_runner(options), options=options)
    _ = (
        pipeline
        | "CreatePendingShards" >> beam.Create([to_element(task) for task in tasks])
        | "Reshuffle" >> beam.Reshuffle()
        # a tuple for each ShardTask
        | "ComputeShard" >> beam.ParDo(ComputeShard(job, shared))
        # Name of each shard. FnApiRunner notices a worker process that was killed by its broken stream of outputs alone:
        # if ComputeShard had none, the command would wait for that worker without end.
        | "CountShards" >> beam.combiners.Count.Globally()
    )
    try:
        result = pipeline.run()
        result.wait_until_finish()
    except Exception as error:
        if "Channel closed prematurely" in str(error):
            raise UserError(
                "a worker process was killed, perhaps for want of memory; nothing published is lost: run the same "
                "command again, with fewer --direct_num_workers or a smaller --image_cache_bytes if so"
            ) from error
        name = options.view_as(StandardOptions).runner or DEFAULT_RUNNER
        if name.rsplit(".", 1)[-1] not in LOCAL_RUNNERS and (found := service_failure(error, runner=name)):
            raise found from error
        raise
    try:
        counters = result.metrics().query()["counters"]
    except NotImplementedError:  # of Dask's runner in Beam 2.77; the summary says so
        return None
    return {c.key.metric.name: c.result for c in counters if c.key.metric.namespace == _METRICS}


def describe_plan(tasks: list[ShardTask], *, seconds_a_batch: float, options: PrecomputeOptions) -> str:
    """One line before the work: how much there is, and whether a shard is too long to lose."""
    records = split_records(tasks)
    rate = options.spec.teacher.batch_size / seconds_a_batch
    longest = max(task.records for task in tasks) / rate
    minutes = sum(records.values()) / rate / 60
    line = (
        f"to compute: {records_text(records)}, in {counted(len(tasks), 'shard')}; teacher alone: {rate:,.0f} images/s, "
        f"{minutes:,.1f} min"
    )
    if longest > SHARD_SECONDS:
        fitting = max(int(SHARD_SECONDS * rate), 1)
        line += (
            f"\nA shard takes {longest / 60:.0f} teacher minutes, and a lost worker costs as much; "
            f"--views_per_shard={fitting} would take ten"
        )
    return line


def summarize(session: StoreSession, spec: Spec, counters: dict[str, int] | None, seconds: float) -> str:
    """The lines at the end; see `run_pipeline` for the counters."""
    views = load_manifest(session.path, digest=spec.digest())[VIEWS_SPLIT]
    cost = views.fidelity()
    text = (
        f"store: {session.location}: {counted(views.records, 'view')} ({counted(views.records // spec.num_examples, 'epoch')} of "
        f"{counted(spec.num_examples, 'example')}), {views.bytes / 1e6:,.1f} MB, {views.bytes / views.records:.0f} bytes a view\n"
        f"codec {codec_cost_text(spec.codec, **cost, temperature=spec.temperature)}"
    )
    if counters is None:
        text += (
            f"\nthis run: {seconds:.1f} s; this runner reports no counters: images/s and the teacher's share of the time are "
            "not known"
        )
    elif written := counters.get("views", 0):
        spent = max(counters["microseconds"], 1)
        text += (
            f"\nthis run: {written:,} images in {seconds:.1f} s, {written / seconds:,.0f} images/s; of a worker's time "
            f"{counters['teacher_microseconds'] / spent:.0%} in the teacher, "
            f"{counters['input_microseconds'] / spent:.0%} waiting for crops"
        )
    return text


def find_accuracy(session: StoreSession, options: PrecomputeOptions) -> dict[str, SplitAccuracy]:
    """The teacher's top-1 on each evaluated split, measured where it is not recorded."""
    return record_accuracy(
        Store(session.location, in_order=False),
        {name: options.datasets[name] for name in options.eval_splits},
        before=session.check_lock,
    )


def try_value_ranges(worker: ShardWorker, options: PrecomputeOptions) -> None:
    """Prints the teacher's top-1 under each value range; see `value_range.check_value_range`."""
    figures = value_range.measure(worker, options.datasets)
    if figures is None:
        print(
            "no labels: the teacher's top-1, and whether its value range is right, are not known", flush=True
        )
        return
    print(figures.text(), flush=True)
    value_range.check_value_range(figures, assumed=options.assume_value_range)


def describe_found(
    finished: list[ShardTask], tasks: list[ShardTask], options: PrecomputeOptions
) -> str | None:
    """One line on what an earlier run has left; None if there is nothing."""
    num_examples = options.spec.num_examples
    published = next((task.first for task in tasks if task.split == VIEWS_SPLIT and not task.sha256), None)
    parts = []
    if published:
        parts.append(f"{published // num_examples:,} of {counted(options.epochs, 'epoch')} are published")
    if finished:
        parts.append(
            f"{counted(len(finished), 'finished shard')} of an interrupted run "
            f"({records_text(split_records(finished))}) will be published without computing anything again"
        )
    return f"found: {'; '.join(parts)}" if parts else None


def repair_tasks(session: StoreSession) -> list[ShardTask]:
    """With `--repair`, the published shards to be computed again; says which, and why."""
    if not (session.path / SPEC_FILE).exists():
        return []
    damaged = damaged_tasks(session.open_store())
    for _, what in damaged:
        print(f"to be computed again: {what}")
    if not damaged:
        print("nothing to repair: every published shard is as the manifest says")
    return [task for task, _ in damaged]


def find_missing(
    session: StoreSession, tasks: list[ShardTask], options: PrecomputeOptions
) -> list[ShardTask]:
    """The shards that are to be computed; prints what an interrupted run has finished of `tasks`.

    Raises:
      UserError: the disk cannot hold them.
    """
    sink = open_sink(options.store, digest=options.spec.digest(), lease=session.lease)
    finished = session.take_over([task for task in tasks if not task.sha256], sink)
    if text := describe_found(finished, tasks, options):
        print(text, flush=True)
    found = set(finished)
    missing = [task for task in tasks if task not in found]
    if missing:
        check_space(missing, options)
    return missing


def make_job(
    session: StoreSession,
    options: PrecomputeOptions,
    runner_options: PipelineOptions,
    identities: Mapping[str, DatasetIdentity],
) -> PrecomputeJob:
    """What workers need to know. Paths are absolute: a worker may run in another directory."""
    buffer_bytes = options.input_buffer_bytes
    return PrecomputeJob(
        store=absolute(options.store),
        spec=options.spec.to_json(),
        data_dir=None if options.data_dir is None else absolute(options.data_dir),
        teacher=absolute(options.teacher),
        image_cache_bytes=options.image_cache_bytes,
        input_buffer_bytes=buffer_share(runner_options) if buffer_bytes is None else buffer_bytes,
        data_cache_bytes=options.data_cache_bytes,
        lease=session.lease,
        progress=absolute(str(session.path)),
        evaluated=tuple(identity for split, identity in identities.items() if split != VIEWS_SPLIT),
    )


def absolute(place: str) -> str:
    """A path of this machine with its directory; a URL as it is."""
    return place if is_url(place) else str(Path(place).absolute())


def try_worker(
    job: PrecomputeJob, missing: list[ShardTask], *, shared: Shared, options: PrecomputeOptions
) -> None:
    """Tries the worker of this process on the first views, and prints how long the missing shards will take.

    Raises:
      UserError, DataError: the teacher cannot be used, or is used wrongly.
    """
    worker = shared.acquire(lambda: ShardWorker(job, options.datasets, teacher=options.loaded), tag=job)
    seconds_a_batch = worker.warm_up()
    try_value_ranges(worker, options)
    worker.check_differs()
    print(describe_plan(missing, seconds_a_batch=seconds_a_batch, options=options), flush=True)


def main(argv: list[str]) -> int:
    """The command; see the module's docstring."""
    flags = parse(argv)
    runner_options = beam_options(flags.beam, make_parser())
    is_demo = announce_demo(flags)
    prepare_directory(flags.store or DEMO_STORE)
    options = resolve(flags, is_demo=is_demo)
    with open_session(options.store) as session:
        session.check(options.spec, repair=options.repair)
        tasks, identities = pending_tasks(options, session.path)
        if options.repair:
            tasks = [*repair_tasks(session), *tasks]
        if not tasks:
            print(f"nothing to do: {counted(options.epochs, 'epoch')} or more are published")
            print(summarize(session, options.spec, {}, 0.0))
            print(accuracy_text(find_accuracy(session, options)))
            return 0
        missing = find_missing(session, tasks, options)
        job = make_job(session, options, runner_options, identities)
        print(describe_eval_splits(options))
        shared = Shared()
        if missing:
            try_worker(job, missing, shared=shared, options=options)
        session.write_spec(options.spec)
        begun = time.monotonic()
        counters: dict[str, int] | None = {}
        with (
            beam_worker.workers_end_with_command() as fail,
            Publisher(session, options.spec, tasks, identities, fail=fail) as publisher,
        ):
            if missing:
                with Progress(session.path, missing, publisher):
                    counters = run_pipeline(missing, job, shared=shared, options=runner_options)
        session.remove_leftovers()  # notes, and what workers have left that were lost
        seconds = time.monotonic() - begun
        accuracy = find_accuracy(session, options)
        print(summarize(session, options.spec, counters, seconds))
        print(accuracy_text(accuracy))
    return 0
