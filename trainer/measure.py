"""What a step costs online and offline, measured: `python -m trainer.measure --store=DIR --output=FILE ...`.

Takes the flags of `trainer.train`, and is run by `trainer.compare` after the training. Five things take turns in one
process, on the run's own batches, so that a machine whose speed drifts slows all alike: steps offline (replayed
batches), steps online (the same batches, the live teacher), the student's update alone (one batch that stays in
memory), the teacher alone, and the input alone.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take seconds
    from pipeline.errors import run_module

    run_module("trainer.measure")

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tensorflow as tf

from pipeline.errors import UserError
from pipeline.store.files import write_json
from pipeline.store.reader import Store
from pipeline.views.mix import mix
from trainer.cli.train import make_parser
from trainer.options import resolve
from trainer.replay import step_batches
from trainer.train import Run

_ROUNDS = 5  # that count, after one that does not
_ROUND_SECONDS = 2.0  # of the slowest of the five, about
# Of each, before: while the input fills its buffers a step takes up to three times as long.
_WARM_UP_STEPS, _WARM_UP_SECONDS = 12, 15.0
_MOST_STEPS = 20  # a round

HOW = (
    "median of {rounds} rounds of {steps} steps; steps offline, steps online, the student's update alone, the teacher "
    "alone and the input alone take turns in one process, on the run's own batches"
)

Work = Callable[[], object]  # a step, finished when it returns


def measure(contenders: dict[str, Work]) -> tuple[dict[str, float], int]:
    """Seconds a step of each contender, the median over rounds, and how many steps a round has."""
    slowest = 0.0
    for work in contenders.values():
        slowest = max(slowest, _warm_up(work))
    steps = min(max(round(_ROUND_SECONDS / slowest), 1), _MOST_STEPS)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(_ROUNDS + 1):
        for name, work in contenders.items():
            begun = time.perf_counter()
            for _ in range(steps):
                work()
            if number:
                seconds[name].append((time.perf_counter() - begun) / steps)
    return {name: statistics.median(values) for name, values in seconds.items()}, steps


def _warm_up(work: Work) -> float:
    """Seconds of the last step of the first ones."""
    work()  # traces
    begun = ended = time.perf_counter()
    seconds = 0.0
    for _ in range(_WARM_UP_STEPS):
        work()
        seconds, ended = time.perf_counter() - ended, time.perf_counter()
        if ended - begun > _WARM_UP_SECONDS:
            break
    return seconds


def _run(flags: argparse.Namespace, store: Store, workdir: str, arm: str) -> Run:
    asked = copy.copy(flags)
    asked.arm, asked.workdir, asked.steps_per_execution = arm, workdir, 1
    return Run(resolve(asked, store), store)


def _batches(run: Run) -> Iterator[Any]:
    """A run's batches, over and over."""
    arm, steps = run.options.arm, int(run.options.length.steps)
    return iter(arm.batches(step_batches(run.input, 0, steps, with_stored=arm.live)).repeat())


def _step(run: Run, batches: Iterator[Any]) -> Work:
    function = run.distiller.make_train_function()
    return lambda: float(function(batches)["loss"])


def main(argv: list[str]) -> int:
    """The command; see the module's docstring."""
    parser = make_parser()
    parser.prog, parser.description = "python -m trainer.measure", "Measures steps online and offline."
    parser.add_argument("--output", required=True, help="JSON file of the figures")
    with tempfile.TemporaryDirectory() as workdir:
        flags = parser.parse_strictly([*argv, f"--workdir={workdir}"])
        if flags.strategy != "default":
            raise UserError(f"--strategy={flags.strategy}: one device is measured, leave it out")
        if flags.deterministic:
            tf.config.experimental.enable_op_determinism()
        store = Store(flags.store, shard_cache_bytes=flags.shard_cache_bytes)
        tf.keras.utils.set_random_seed(flags.seed)
        offline = _run(argparse.Namespace(**{**vars(flags), "teacher": None}), store, workdir, "offline")
        online = _run(flags, store, workdir, "online")
    if online.teacher is None or online.online_teacher is None:
        raise ValueError("a live arm has a teacher")
    replayed = _batches(offline)
    resident = next(replayed)
    alone = iter(tf.data.Dataset.from_tensors(resident).repeat())
    views = mix(resident["crops"], resident["partner"], resident["ratio"])
    forward = tf.function(online.online_teacher, jit_compile=flags.jit_compile)

    def draw() -> object:
        return next(replayed)["crops"].numpy()

    seconds, steps = measure(
        {
            "offline": _step(offline, replayed),
            "online": _step(online, _batches(online)),
            "student": _step(offline, alone),
            "teacher": lambda: forward(views).numpy(),
            "input": draw,
        }
    )
    figures = {
        "seconds_a_step": seconds,
        "batch_size": online.options.recipe.batch_size,
        "teacher_parameters": online.teacher.num_parameters,
        "how": HOW.format(rounds=_ROUNDS, steps=steps),
    }
    write_json(Path(flags.output), figures)
    return 0
