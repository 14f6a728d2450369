"""Compares the training loop of the Keras example with this project's: images per second, accuracy after equal time.

    python -m pipeline.precompute --runner=DirectRunner --dataset=oxford_flowers102 --data_dir=DATA --teacher=TEACHER \
        --recipe=keras_example --epochs=125 --store=STORE           # about 12 minutes at 190 views/s, 28 MB
    python tests/benchmarks/seed_example.py --store=STORE --data_dir=DATA --teacher=TEACHER --student=small \
        --seconds=600 --output=FILE.json                            # about 25 minutes: 2 x 600 s, and the rates

`example` is `keras_example.py` in this directory: views drawn on the fly, and the teacher in each step. `offline` replays
the store. Student, initial weights, teacher, batch size, optimizer, loss and schedule are the same. Flags are those of the
trainer, with the recipe `keras_example` (batch size 64, T = 10, TFA's AdamW). 125 epochs are the 1,992 steps of the
published schedule. Another store needs `--allow_recipe_mismatch` and compares other views.

The benchmark first measures the rates in turns of one epoch each. With `--seconds` it then trains both students for that
time, in turns, and evaluates them on the same images (`--eval_split`, default `test`). The time includes tracing. It
excludes evaluation and precompute, which costs one teacher pass per stored view for all students together.

`--schedule=published` has the published steps: 1,500 steps of warm-up and a cosine to 0 at step 1,992, where a side stops,
so the faster side gets further. `--schedule=fitted` ends the cosine of each side at the end of its time, estimated from
the measured rates, after a warm-up of 5 % (the default of the trainer).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from alternate import measure, median, ratio
from keras_example import SCHEDULE_STEPS, WARMUP_STEPS, OnlineDistiller, training_batches

from pipeline.cli.main import run_command
from pipeline.cli.parser import positive
from pipeline.errors import UserError
from pipeline.inputs.locate import find_teacher, load_teacher
from pipeline.inputs.teacher import Teacher
from pipeline.store.reader import StoreReader
from trainer import models
from trainer.config.run_files import Evaluation
from trainer.flags.train import make_parser
from trainer.run.builder import build_run
from trainer.run.evaluation import accuracy_text
from trainer.run.options import resolve
from trainer.run.training import Run
from trainer.step.distiller import Distiller
from trainer.step.optimizers import recipe_optimizer
from trainer.step.schedules import WarmupCosine

PUBLISHED = WarmupCosine(SCHEDULE_STEPS, WARMUP_STEPS)
TURNS = 20  # per side


@dataclasses.dataclass(kw_only=True)
class Side:
    """One way to train a student, with its progress."""

    student: tf.keras.Model
    step: Callable[[Iterator[Any]], dict[str, tf.Tensor]]
    batches: Iterator[Any]
    schedule: WarmupCosine
    steps: int = 0
    images: int = 0
    seconds: float = 0.0

    def train(self, steps: int) -> int:
        """Trains some steps; returns their number of images."""
        before, started = self.images, time.perf_counter()
        for _ in range(steps):
            logs = self.step(self.batches)
            self.images += int(logs["images"] if "images" in logs else tf.size(logs["views"]))
        float(logs["loss"])
        self.steps += steps
        self.seconds += time.perf_counter() - started
        return self.images - before

    def train_until(self, seconds: float) -> bool:
        """Trains until a total time in seconds; returns False at the end of the schedule."""
        while self.seconds < seconds and self.steps < self.schedule.total_steps:
            self.train(1)
        return self.steps < self.schedule.total_steps


class Bench:
    """The common parts of both sides.

    Args:
      run: Offline run of the trainer. The weights of its student are the initial weights of both sides.
      teacher: Live teacher of the example.
    """

    def __init__(self, run: Run, teacher: Teacher) -> None:
        self.run, self.teacher = run, teacher
        self.batch_size = run.options.recipe.batch_size
        self._initial_weights = run.student.get_weights()
        self._encoded = run.dataset.read(np.arange(run.dataset.num_examples))

    def student(self) -> tf.keras.Model:
        """A student with the initial weights."""
        spec, options = self.run.store.spec, self.run.options
        student = models.build_student(
            options.recipe.student,
            num_classes=spec.num_classes,
            image_size=spec.policy.image_size,
            precision=options.flags.precision,
        )
        student.set_weights(self._initial_weights)
        return student

    def sides(self, schedules: dict[str, WarmupCosine]) -> dict[str, Side]:
        """Both sides at step 0, each with its schedule."""
        return {"example": self.example(schedules["example"]), "offline": self.offline(schedules["offline"])}

    def example(self, schedule: WarmupCosine) -> Side:
        """The side of the Keras example."""
        batches = training_batches(
            self._encoded,
            image_size=self.run.store.spec.policy.image_size,
            batch_size=self.batch_size,
        )
        student = self.student()
        distiller = OnlineDistiller(student, self.teacher, temperature=self.run.options.temperature)
        return self._side(distiller, batches, schedule)

    def offline(self, schedule: WarmupCosine) -> Side:
        """The side of the trainer; repeats a store that is too short."""
        stop = int(self.run.options.length.steps)
        batches = self.run.targets.batches(0, stop).repeat()
        distiller = Distiller(
            self.student(),
            temperature=self.run.options.temperature,
            temperature_squared=self.run.options.recipe.temperature_squared,
        )
        return self._side(distiller, batches, schedule)

    def _side(self, distiller: tf.keras.Model, batches: tf.data.Dataset, schedule: WarmupCosine) -> Side:
        recipe = self.run.options.recipe
        distiller.compile(optimizer=recipe_optimizer(recipe, schedule))
        step = distiller.make_train_function()
        return Side(student=distiller.student, step=step, batches=iter(batches), schedule=schedule)


def parse(argv: list[str]) -> argparse.Namespace:
    """Parses the flags of the trainer and of this benchmark."""
    parser = make_parser()
    parser.add_argument("--rounds", type=positive, default=5, help="Number of rounds for the rates.")
    parser.add_argument("--steps_a_round", type=positive, help="Steps per round (default: one epoch).")
    parser.add_argument(
        "--seconds", type=positive, help="Seconds of training per side (default: rates only)."
    )
    parser.add_argument("--schedule", choices=("published", "fitted"), default="published")
    parser.add_argument("--output", help="JSON file for all figures.")
    parser.set_defaults(recipe="keras_example", eval_split="test")
    with tempfile.TemporaryDirectory() as workdir:  # required, but not used
        flags = parser.parse_strictly([*argv, f"--workdir={workdir}"])
    if flags.epochs or flags.steps:
        raise UserError(
            "--epochs and --steps: no effect on a timed benchmark; use --rounds and --seconds instead"
        )
    return flags


def choose_schedules(
    name: str, rates: dict[str, list[float]], *, seconds: int, batch_size: int
) -> dict[str, WarmupCosine]:
    """The schedule of each side; `fitted` depends on the rates in images per second."""
    if name == "published":
        return dict.fromkeys(rates, PUBLISHED)
    steps = {side: max(int(median(values) * seconds / batch_size), 1) for side, values in rates.items()}
    return {side: WarmupCosine(count, count // 20) for side, count in steps.items()}


def train_equally_long(sides: dict[str, Side], seconds: int) -> None:
    """Trains both sides in turns, so that a drift of the machine's speed affects both."""
    for turn in range(1, TURNS + 1):
        for name, side in sides.items():
            if not side.train_until(seconds * turn / TURNS):
                print(f"{name}: at the end of its schedule after {side.seconds:.0f} s", flush=True)


def describe(name: str, side: Side, evaluation: Evaluation, bench: Bench) -> dict[str, Any]:
    """Prints and returns the figures of a side."""
    store = bench.run.store
    epochs = side.images / store.spec.num_examples
    rate = bench.run.options.recipe.learning_rate * float(side.schedule(side.steps))
    print(
        f"{name}: {side.steps:,} steps, {epochs:.1f} epochs in {side.seconds:.0f} s, final learning rate {rate:.2g}; "
        f"{bench.run.options.eval_split}: top-1 {accuracy_text(evaluation['student_top1'])}, "
        f"agreement {evaluation['agreement']:.2%}, distillation loss {evaluation['distillation_loss']:.4f}"
    )
    if name == "offline" and epochs > store.epochs:
        print(
            f"offline: the {store.epochs} epochs of the store were used {epochs / store.epochs:.1f} times; precompute more"
        )
    return {
        "steps": side.steps,
        "epochs": epochs,
        "seconds": side.seconds,
        "schedule": side.schedule.get_config(),
        "learning_rate_at_end": rate,
        "teacher_forward_passes": side.images if name == "example" else 0,
        "evaluation": evaluation,
    }


def measure_rates(bench: Bench, *, rounds: int, steps_a_round: int) -> dict[str, list[float]]:
    """Images per second of each round, by side."""
    sides = bench.sides({"example": PUBLISHED, "offline": PUBLISHED})
    contenders = {name: functools.partial(side.train, steps_a_round) for name, side in sides.items()}
    rates = measure(contenders, rounds=rounds)
    size = bench.batch_size
    for name, values in rates.items():
        print(f"{name}: median {median(values):,.1f} images/s, {size / median(values):.3f} s for {size}")
    print(f"offline: {ratio(rates, 'offline', 'example'):.2f} times the images per second of the example")
    return rates


def measure_accuracy(bench: Bench, schedules: dict[str, WarmupCosine], *, seconds: int) -> dict[str, Any]:
    """Figures of each side after some seconds of training from the initial weights."""
    sides = bench.sides(schedules)
    train_equally_long(sides, seconds)
    evaluator = bench.run.evaluator(bench.run.options.eval_split)
    return {
        name: describe(name, side, evaluator.evaluate(side.student), bench) for name, side in sides.items()
    }


def main(argv: list[str]) -> int:
    """Runs the benchmark."""
    flags = parse(argv)
    store = StoreReader(flags.store[0])
    (given,) = flags.teacher or [None]
    teacher = load_teacher(store.spec, find_teacher(store.spec, given, store=store.location))
    flags.teacher, flags.epochs = None, store.epochs  # an offline run of the whole store
    tf.keras.utils.set_random_seed(flags.seed)
    bench = Bench(build_run(resolve(flags, store), store), teacher)
    size, recipe = bench.batch_size, bench.run.options.recipe
    count = flags.steps_a_round or math.ceil(store.spec.num_examples / size)
    rates = measure_rates(bench, rounds=flags.rounds, steps_a_round=count)
    result: dict[str, Any] = {
        "dataset": store.spec.dataset.to_json(),
        "policy": store.spec.policy.to_json(),
        "recipe": recipe.to_json(),
        "tensorflow": tf.__version__,
        "images_per_second": rates,
        "offline_to_example": ratio(rates, "offline", "example"),
    }
    if flags.seconds:
        schedules = choose_schedules(flags.schedule, rates, seconds=flags.seconds, batch_size=size)
        print(f"{flags.seconds} s of training per side, schedule {flags.schedule}:", flush=True)
        result |= {
            "seconds": flags.seconds,
            "schedule": flags.schedule,
            "trained": measure_accuracy(bench, schedules, seconds=flags.seconds),
            "teacher_passes_of_the_store": store.views.num_records,
        }
    if flags.output:
        Path(flags.output).write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    run_command(main)
