"""Compares the time of training steps online with that of the same steps offline, by `trainer.comparison.measure`.

    python tests/benchmarks/saving.py --store=DIR --data_dir=DIR --teacher=PATH --student=small --batch_size=64
    python tests/benchmarks/saving.py --store=DIR --data_dir=DIR --teacher_model=bit_r101x3 --student=bit_r50x1 --batch_size=16

With `--teacher_model` the teacher is an architecture with random weights, which do not affect its cost. If the student
waits only for the teacher, t_online / t_offline - 1 is t_teacher / t_student. The goal is 0.9 of that, for a teacher that
costs at least as much as the student. Use a store whose --teacher_batch_size divides the batch: others need padding.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import tensorflow as tf

from pipeline.cli.main import run_command
from pipeline.cli.parser import Parser
from pipeline.store.spec import Spec
from trainer import models
from trainer.comparison.measure import NAMES
from trainer.comparison.measure import main as measure
from trainer.run import builder


class RandomTeacher(tf.Module):
    """An architecture in place of a store's teacher."""

    def __init__(self, name: str, spec: Spec) -> None:
        super().__init__()
        size = spec.policy.image_size
        self._model = models.build_student(name, num_classes=spec.num_classes, image_size=size)
        self.num_parameters = self._model.count_params()

    def __call__(self, views: tf.Tensor) -> tf.Tensor:
        return self._model(views, training=False)


def main(argv: list[str]) -> int:
    """Runs the benchmark; takes the flags of the trainer."""
    parser = Parser(add_help=False)
    parser.add_argument("--teacher_model", choices=sorted(models.STUDENTS))
    flags, rest = parser.parse_known_args(argv)
    if flags.teacher_model is not None:
        made: Any = lambda spec, path: RandomTeacher(flags.teacher_model, spec)  # noqa: E731
        builder.load_teacher = made
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "cost.json"
        measure([*rest, f"--output={output}"])
        figures = json.loads(output.read_text())
    seconds, size = figures["seconds_a_step"], figures["batch_size"]
    for name in NAMES:
        low, high = figures["seconds_a_step_spread"][name]
        print(f"{name}: median {seconds[name]:.3f} s ({low:.3f} to {high:.3f}) for {size} views")
    saving, limit = seconds["online"] / seconds["offline"] - 1, seconds["teacher"] / seconds["student"]
    print(f"t_online / t_offline - 1 = {saving:.2f}; t_teacher / t_student = {limit:.2f}")
    print(f"the saving is {saving / limit:.2f} of the limit")
    return 0


if __name__ == "__main__":
    run_command(main)
