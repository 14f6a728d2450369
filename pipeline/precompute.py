r"""Runs the teacher once and stores its logits: `python -m pipeline.precompute --runner=DirectRunner`.

Writes seeded augmentation parameters and teacher logits for many augmented epochs into a store. After a crash, the same
command continues; with more epochs, it extends the store.

    python -m pipeline.precompute --runner=DirectRunner                       # embedded default, about a minute
    python -m pipeline.precompute --runner=DirectRunner --dataset=oxford_flowers102 --data_dir=DIR \
        --teacher=SAVED_MODEL --store=DIR --epochs=50 --recipe=bit            # 1,020 images, a few minutes

This module has the command and the Beam graph, and is the only one that imports Beam. The work itself is in
`pipeline.precomputing`.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take seconds
    from pipeline.cli.main import run_module

    run_module("pipeline.precompute", flags="pipeline.flags.precompute")

import shlex
import sys
import time
from collections.abc import Iterator

import apache_beam as beam
from apache_beam.metrics import Metrics
from apache_beam.options.pipeline_options import (
    DirectOptions,
    GoogleCloudOptions,
    PipelineOptions,
    StandardOptions,
)
from apache_beam.options.pipeline_options_validator import PipelineOptionsValidator
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.runners.runner import PipelineResult, PipelineRunner, PipelineState, create_runner
from apache_beam.transforms.environments import SubprocessSDKEnvironment
from apache_beam.utils.shared import Shared

from pipeline.cli.choices import DEMO_STORE
from pipeline.cli.environment import usable_cpus, usable_memory, use_keras_2
from pipeline.cli.parser import Parser
from pipeline.cli.units import counted
from pipeline.errors import UserError
from pipeline.errors.causes import first_line
from pipeline.flags.beam import DEFAULT_RUNNER, LOCAL_RUNNERS, runner_name
from pipeline.flags.precompute import announce_demo, make_parser, parse
from pipeline.precomputing import beam_worker
from pipeline.precomputing.accuracy import accuracy_text, record_accuracy
from pipeline.precomputing.options import resolve
from pipeline.precomputing.preflight import find_work, make_job, try_worker
from pipeline.precomputing.progress import Progress
from pipeline.precomputing.publishing import Publisher
from pipeline.precomputing.reports import eval_splits_text, summary_text
from pipeline.precomputing.services import check_staging, service_failure
from pipeline.precomputing.store_session import open_session, prepare_directory, recorded_classes
from pipeline.precomputing.worker import PrecomputeJob, ShardWorker
from pipeline.store.reader import StoreReader
from pipeline.store.shards import ShardTask

_METRICS = "precompute"


# A ShardTask as Beam ships it: its fields in order. Beam does not pickle plain tuples one by one, and a large store has tens
# of thousands.
Element = tuple[str, int, int, int, str | None]


def to_element(task: ShardTask) -> Element:
    """Task to tuple."""
    return task.split, task.number, task.first, task.records, task.sha256


def from_element(element: Element) -> ShardTask:
    """Tuple to task."""
    split, number, first, records, sha256 = element
    return ShardTask(split=split, number=number, first=first, records=records, sha256=sha256)


class ComputeShard(beam.DoFn):
    """Computes the shard of a task. Teacher and data set are loaded once per process."""

    def __init__(self, job: PrecomputeJob, shared: Shared) -> None:
        self._job = job
        self._shared = shared

    def setup(self) -> None:
        """Takes this process's worker, or makes one."""
        use_keras_2()  # a worker of Dask or Dataflow is no command of ours
        job = self._job
        self._worker: ShardWorker = self._shared.acquire(lambda: ShardWorker(job), tag=job)

    def process(self, element: Element) -> Iterator[str]:
        """Computes one shard and yields its name. The command finds the shard by its note."""
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
    """Beam options from the arguments that are not flags of this project.

    Args:
      arguments: these arguments.
      parser: parser of the other flags, for suggestions.

    Raises:
      UserError: no Beam option class knows a flag, which Beam itself would drop with a warning, or an option is invalid.
    """
    # The runner first: importing the module of a runner such as Dask's defines its options.
    name = runner_name(arguments)
    try:
        create_runner(name)
    except (ValueError, ImportError, AttributeError) as error:
        raise UserError(f"--runner={name}: {first_line(error)}") from error
    beam_parser = Parser(prog="beam", add_help=False, conflict_handler="resolve")
    for options in [PipelineOptions, *_subclasses(PipelineOptions)]:
        if "_add_argparse_args" in options.__dict__:
            options._add_argparse_args(beam_parser)
    parsed, unknown = beam_parser.parse_known_args(arguments)
    if unknown:
        parser.refuse(unknown, also=beam_parser.flag_names())
    if _is_dask(create_runner(name)) and parsed.partition_size is None and parsed.npartitions is None:
        # Otherwise Beam makes one Dask task of 128 shards: at most one worker in 128 shards has work, and a lost worker
        # takes all of them along.
        arguments = [*arguments, "--dask_partition_size=1"]
    out = PipelineOptions(arguments)
    if mistakes := PipelineOptionsValidator(out, create_runner(name)).validate():
        raise UserError(f"--runner={name}: {'; '.join(' '.join(str(line).split()) for line in mistakes)}")
    return out


def _is_dask(runner: PipelineRunner) -> bool:
    """Whether a runner is Beam's Dask runner, whose module needs not be installed."""
    return type(runner).__name__ == "DaskRunner"


def make_runner(options: PipelineOptions) -> PipelineRunner:
    """The runner of `--runner`. Worker processes of the local runner run `beam_worker`."""
    runner = create_runner(options.get_all_options()["runner"] or DEFAULT_RUNNER)
    direct = options.view_as(DirectOptions)
    if isinstance(runner, FnApiRunner) and direct.direct_running_mode == "multi_processing":
        # `exec`: Beam's shell would print a traceback after Ctrl-C.
        command = f"exec {shlex.quote(sys.executable)} -m {beam_worker.__name__}"
        runner = FnApiRunner(SubprocessSDKEnvironment.from_command_string(command))
        direct.direct_running_mode = None  # otherwise it sets Beam's own command
    return runner


def staging_place(options: PipelineOptions) -> str | None:
    """Where the job of a Dataflow runner is staged; None for other runners."""
    runner = create_runner(options.view_as(StandardOptions).runner or DEFAULT_RUNNER)
    if not type(runner).__name__.endswith("DataflowRunner"):
        return None
    google = options.view_as(GoogleCloudOptions)
    place: str = google.staging_location or google.temp_location
    return place


def buffer_share(options: PipelineOptions) -> int | None:
    """Default of `--input_buffer_bytes` for worker processes that share this machine; None for a single process."""
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
    tasks: list[ShardTask], job: PrecomputeJob, *, shared: Shared, options: PipelineOptions
) -> dict[str, int] | None:
    """Runs the Beam graph.

    Args:
      tasks: shards to compute.
      job: job of the workers.
      shared: holds the worker of this process, if there is one.
      options: Beam options.

    Returns:
      Counters by name, or None if the runner reports none.

    Raises:
      UserError: a worker process was killed, or the runner's service refused or did not answer.
    """
    runner = make_runner(options)
    pipeline = beam.Pipeline(runner, options=options)
    shards = (
        pipeline
        | "CreatePendingShards" >> beam.Create([to_element(task) for task in tasks])
        | "Reshuffle" >> beam.Reshuffle()
        # Element: one ShardTask as a tuple
        | "ComputeShard" >> beam.ParDo(ComputeShard(job, shared))
        # str: name of a shard
    )
    if not _is_dask(runner):
        # FnApiRunner notices a killed worker process only by its broken output stream, so without outputs of ComputeShard
        # the command would wait for it forever. Dask notices by itself, and would shuffle all tasks for a count: the
        # scheduler takes 12 times as many steps for 64 shards, and the factor grows with their number.
        _ = shards | "CountShards" >> beam.combiners.Count.Globally()
    result = None
    try:
        result = pipeline.run()
        result.wait_until_finish()
    except BaseException as error:
        if result is not None:
            _cancel(result)
        if isinstance(error, Exception) and (found := _service_error(error, options)) is not None:
            raise found from error
        raise
    try:
        counters = result.metrics().query()["counters"]
    except NotImplementedError:  # Dask's runner in Beam 2.77
        return None
    return {c.key.metric.name: c.result for c in counters if c.key.metric.namespace == _METRICS}


def _service_error(error: Exception, options: PipelineOptions) -> UserError | None:
    """The error of a killed worker process or of the runner's service; None for other errors."""
    if "Channel closed prematurely" in str(error):
        return UserError(
            "a worker process was killed, perhaps because memory ran out; published data is safe: run the same command "
            "again, with fewer --direct_num_workers or a smaller --image_cache_bytes if memory is short"
        )
    name = options.view_as(StandardOptions).runner or DEFAULT_RUNNER
    return None if name.rsplit(".", 1)[-1] in LOCAL_RUNNERS else service_failure(error, runner=name)


def _cancel(result: PipelineResult) -> None:
    """Cancels the job of a service if it has not ended: its workers would go on, without a lock, and be billed."""
    try:
        if not PipelineState.is_terminal(result.state):
            result.cancel()
    except Exception as error:  # noqa: BLE001  # of any client library; the command ends for another reason
        print(
            f"the job cannot be canceled ({first_line(error)}); cancel it in the service's own console",
            file=sys.stderr,
        )


def main(argv: list[str]) -> int:
    """Runs the command; see the module docstring."""
    flags = parse(argv)
    runner_options = beam_options(flags.beam, make_parser())
    if (staging := staging_place(runner_options)) is not None:
        check_staging(staging)
    is_demo = announce_demo(flags)
    location = flags.store or DEMO_STORE
    prepare_directory(location)
    options = resolve(flags, is_demo=is_demo, recorded=recorded_classes(location))
    if options.match.note is not None:
        print(options.match.note, flush=True)
    with open_session(options.store) as session:
        work = find_work(session, options)
        start = time.monotonic()
        counters: dict[str, int] | None = {}
        if not work.tasks:
            print(f"nothing to do: {counted(options.epochs, 'epoch')} or more are published")
            session.write_classes(options.classes, options.spec)
        else:
            print(eval_splits_text(options))
            job = make_job(session, options, work.identities, input_buffer_bytes=buffer_share(runner_options))
            shared = Shared()
            if work.to_compute:
                worker = shared.acquire(
                    lambda: ShardWorker(job, options.datasets, teacher=options.loaded), tag=job
                )
                try_worker(worker, work.to_compute, options)
            session.write_spec(options.spec)
            session.write_classes(options.classes, options.spec)
            start = time.monotonic()
            with (
                beam_worker.workers_end_with_command() as fail,
                Publisher(session, options.spec, work.tasks, work.identities, fail=fail) as publisher,
            ):
                if work.to_compute:
                    with Progress(session.path, work.to_compute, publisher.published_epochs):
                        counters = run_pipeline(work.to_compute, job, shared=shared, options=runner_options)
            session.remove_leftovers()
        seconds = time.monotonic() - start
        accuracy = record_accuracy(
            StoreReader(session.location, in_order=False),
            {name: options.datasets[name] for name in options.eval_splits},
            options.match,
            before=session.check_lock,
        )
        print(summary_text(session, options.spec, counters, seconds=seconds))
        if options.match.no_accuracy is None:
            print(accuracy_text(accuracy))
    return 0
