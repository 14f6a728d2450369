"""Measures the time per step, online and offline: `python -m trainer.comparison.measure --store=DIR --output=FILE ...`.

Takes the flags of `trainer.train`. `trainer.compare` runs it after the training. Five contenders take turns in one
process on the run's own batches, so that a drift of the machine's speed affects all of them: steps offline (replayed
batches), steps online (the same batches with the live teacher), the student's update alone (one batch in memory), the
teacher alone, and the input alone.

Other threads render batches ahead. So a turn starts when their buffers are full and ends when they are full again: it
includes the cost of the batches that it takes, and of no others.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take seconds
    from pipeline.cli.main import run_module

    run_module("trainer.comparison.measure")

import argparse
import copy
import dataclasses
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from pipeline.errors import UserError
from pipeline.inputs.device_memory import naming_memory
from pipeline.storage.files import write_json
from pipeline.store.combination import open_stores
from pipeline.store.view_store import ViewStore
from pipeline.views.mix import mix
from pipeline.views.source import ImageSource
from trainer.flags.train import make_parser
from trainer.run.builder import build_run
from trainer.run.options import resolve
from trainer.run.training import Run
from trainer.step.distiller import shown_to_teacher

_ROUNDS = 5  # after a first one that does not count
_TURN_SECONDS = 2.0  # approximate length of a turn
_MOST_STEPS = 20  # per turn
_WARM_UP_STEPS, _WARM_UP_SECONDS = 3, 15.0  # per contender, after the step that traces
# A process is idle when its threads together work for less than this fraction of a poll interval.
_POLL_SECONDS, _IDLE_SHARE, _IDLE_TIMEOUT = 0.02, 0.25, 60.0
_READ = 256  # images per read
NAMES = ("offline", "online", "student", "teacher", "input")
TURNS = len(NAMES) * (_ROUNDS + 2)  # of a whole measurement, with the warm-up and the first round

Work = Callable[[], object]  # does one step and returns when it is finished


@dataclasses.dataclass(frozen=True)
class Measured:
    """Measured times, by contender.

    Attributes:
      seconds: Median seconds per step over the rounds.
      spread: Minimum and maximum over the rounds.
    """

    seconds: dict[str, float]
    spread: dict[str, tuple[float, float]]
    steps: dict[str, int]

    def describe(self) -> str:
        """A description of the method, for the report."""
        low, high = min(self.steps.values()), max(self.steps.values())
        count = f"{low} to {high} steps" if low < high else f"{low} {'step' if low == 1 else 'steps'}"
        return (
            f"median of {_ROUNDS} turns of {count} each; steps offline, steps online, the student's update alone, the teacher "
            "alone and the input alone take turns in one process on the run's own batches"
        )


def measure(contenders: dict[str, Work], *, on_turn: Callable[[], object] = lambda: None) -> Measured:
    """Measures the seconds per step of contenders that take turns.

    Args:
      contenders: One step of each contender, by name.
    """
    steps = {}
    for name, work in contenders.items():
        steps[name] = min(max(round(_TURN_SECONDS / _warm_up(work)), 1), _MOST_STEPS)
        on_turn()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(_ROUNDS + 1):
        for name, work in contenders.items():
            _wait_until_idle()
            started = time.perf_counter()
            for _ in range(steps[name]):
                work()
            ended = _wait_until_idle()
            if number:
                seconds[name].append((ended - started) / steps[name])
            on_turn()
    return Measured(
        {name: statistics.median(values) for name, values in seconds.items()},
        {name: (min(values), max(values)) for name, values in seconds.items()},
        steps,
    )


def _warm_up(work: Work) -> float:
    """Runs the first steps; returns the seconds of the last one."""
    work()  # traces
    started = ended = time.perf_counter()
    seconds = 0.0
    for _ in range(_WARM_UP_STEPS):
        work()
        seconds, ended = time.perf_counter() - ended, time.perf_counter()
        if ended - started > _WARM_UP_SECONDS:
            break
    return seconds


def _wait_until_idle() -> float:
    """Waits until no thread of this process works; returns the time (`time.perf_counter`) at which the last one stopped."""
    deadline = time.monotonic() + _IDLE_TIMEOUT
    while True:
        since, work = time.perf_counter(), time.process_time()
        time.sleep(_POLL_SECONDS)
        idle = time.process_time() - work < _IDLE_SHARE * _POLL_SECONDS
        if idle or time.monotonic() > deadline:
            return since


def _run(flags: argparse.Namespace, store: ViewStore, workdir: str, arm: str) -> Run:
    asked = copy.copy(flags)
    asked.arm, asked.workdir, asked.steps_per_execution = arm, workdir, 1
    return build_run(resolve(asked, store), store)


def _batches(run: Run) -> Iterator[Any]:
    """The batches of a run, repeated without end."""
    return iter(run.targets.batches(0, int(run.options.length.steps)).repeat())


def _step(run: Run, batches: Iterator[Any]) -> Work:
    function = run.distiller.make_train_function()
    return lambda: float(function(batches)["loss"])


def _fill_cache(source: ImageSource) -> None:
    """Decodes all images if they are cached, which is the state after the first epoch of a run."""
    count = source.images.num_examples if source.cached else 0
    for start in range(0, count, _READ):
        source.load(np.arange(start, min(start + _READ, count)))


def _contenders(offline: Run, online: Run, *, jit_compile: bool) -> dict[str, Work]:
    """The contenders by name."""
    online.targets.input = offline.targets.input  # the same views, and one cache of decoded images
    _fill_cache(offline.targets.input.source)
    resident = next(_batches(offline))
    alone = iter(tf.data.Dataset.from_tensors(resident).repeat())
    seen = next(_batches(online))
    views = shown_to_teacher(seen, mix(seen["crops"], seen["partner"], seen["ratio"]))
    forward = tf.function(online.teachers, jit_compile=jit_compile)
    drawn = _batches(offline)  # not those of the offline steps, whose buffers it would drain

    def draw() -> object:
        return next(drawn)["crops"].numpy()

    works: list[Work] = [
        _step(offline, _batches(offline)),
        _step(online, _batches(online)),
        _step(offline, alone),
        lambda: [logits.numpy() for logits in tf.nest.flatten(forward(views))],
        draw,
    ]
    return dict(zip(NAMES, works, strict=True))


def main(argv: list[str]) -> int:
    """The command; see the module's docstring."""
    parser = make_parser()
    parser.prog, parser.description = (
        "python -m trainer.comparison.measure",
        "Measures the time per step, online and offline.",
    )
    parser.add_argument("--output", required=True, help="JSON file for the figures.")
    parser.add_argument("--progress", type=Path, help="File to which a line is appended after each turn.")
    with tempfile.TemporaryDirectory() as workdir:
        flags = parser.parse_strictly([*argv, f"--workdir={workdir}"])
        if flags.strategy != "default":
            raise UserError(
                f"--strategy={flags.strategy}: steps are measured on one device only; leave the flag out"
            )
        if flags.deterministic:
            tf.config.experimental.enable_op_determinism()
        store = open_stores(
            flags.store,
            weights=flags.store_weights,
            image_size=flags.image_size,
            shard_cache_bytes=flags.shard_cache_bytes,
        )
        tf.keras.utils.set_random_seed(flags.seed)
        offline = _run(argparse.Namespace(**{**vars(flags), "teacher": None}), store, workdir, "offline")
        online = _run(flags, store, workdir, "online")
    if online.teachers is None:
        raise ValueError("a live arm has a teacher")
    contenders = _contenders(offline, online, jit_compile=flags.jit_compile)
    turns = itertools.count(1)

    def count_turn() -> None:  # for `trainer.run.child_runs.latest_step`
        if flags.progress is not None:
            with flags.progress.open("a") as file:
                file.write(json.dumps({"step": next(turns), "kind": "turn"}) + "\n")

    with naming_memory(online.memory_remedy()):
        measured = measure(contenders, on_turn=count_turn)
    figures = {
        "seconds_a_step": measured.seconds,
        "seconds_a_step_spread": measured.spread,
        "batch_size": online.options.recipe.batch_size,
        "teacher_parameters": online.teachers.num_parameters,
        "how": measured.describe(),
    }
    write_json(Path(flags.output), figures)
    return 0
