"""Compares the time of training steps online with that of the same steps offline.

    python tests/benchmarks/saving.py --store=DIR --data_dir=DIR --teacher=PATH --student=small --batch_size=64
    python tests/benchmarks/saving.py --store=DIR --data_dir=DIR --teacher_model=bit_r101x3 --student=bit_r50x1 \
        --batch_size=16 --rounds=3 --steps_a_round=1

With `--teacher_model` the teacher is an architecture with random weights, which do not affect its cost. If the student
waits only for the teacher, t_online / t_offline - 1 is t_teacher / t_student. The goal is 0.9 of that, for a teacher that
costs at least as much as the student.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from typing import Any

import tensorflow as tf
from alternate import measure, median

from pipeline.cli.main import run_command
from pipeline.inputs.locate import load_teacher, open_dataset
from pipeline.store.reader import StoreReader
from pipeline.views.mix import mix
from trainer import models
from trainer.flags.train import make_parser
from trainer.run.builder import build_run
from trainer.run.options import resolve
from trainer.step.distiller import Distiller
from trainer.targets.batches import Targets
from trainer.targets.online_teacher import BatchedTeacher


def main(argv: list[str]) -> int:
    """Runs the benchmark; takes the flags of the trainer."""
    parser = make_parser()
    parser.add_argument(
        "--teacher_model", choices=sorted(models.STUDENTS), help="Architecture instead of --teacher."
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps_a_round", type=int, default=8)
    with tempfile.TemporaryDirectory() as workdir:
        flags = parser.parse_strictly([*argv, f"--workdir={workdir}"])
        store = StoreReader(flags.store)
        path, flags.teacher = flags.teacher, None  # the run itself is offline
        run = build_run(resolve(flags, store), store)
    size, count, spec = run.options.recipe.batch_size, flags.steps_a_round, store.spec
    teacher: Any = (
        load_teacher(spec, path)
        if flags.teacher_model is None
        else models.build_student(
            flags.teacher_model, num_classes=spec.num_classes, image_size=spec.policy.image_size
        )
    )
    # The teacher batch is at most the student's, so that there is no padding.
    online_teacher = BatchedTeacher(teacher, min(spec.teacher.batch_size, size))
    distiller = Distiller(
        run.student,
        temperature=run.options.temperature,
        temperature_squared=run.options.recipe.temperature_squared,
        teacher=online_teacher,
        round_trip=spec.make_codec().round_trip,
    )
    distiller.compile(optimizer=run.optimizer)
    step = distiller.make_train_function()
    drawn = Targets(
        store,
        open_dataset(store, "views", data_dir=flags.data_dir),
        batch_size=size,
        image_cache_bytes=flags.image_cache_bytes,
        continued_from=0,
    )
    stop = int(run.options.length.steps)
    replayed = iter(run.targets.batches(0, stop).repeat())
    online = iter(drawn.batches(0, stop).repeat())
    resident = next(replayed)
    one_batch = iter(tf.data.Dataset.from_tensors(resident).repeat())
    views = mix(resident["crops"], resident["partner"], resident["ratio"])
    forward = tf.function(online_teacher)

    def train(batches: object) -> Callable[[], int]:
        def work() -> int:
            for _ in range(count):
                logs = step(batches)
            float(logs["loss"])
            return count * size

        return work

    def teach() -> int:
        for _ in range(count):
            forward(views).numpy()
        return count * size

    contenders = {
        "offline": train(replayed),
        "online": train(online),
        "student": train(one_batch),
        "teacher": teach,
    }
    rates = measure(contenders, rounds=flags.rounds)
    for name, values in rates.items():
        print(f"{name}: median {median(values):,.1f} views/s, {size / median(values):.3f} s for {size} views")
    # Of rates in the same round: t_online / t_offline - 1, and t_teacher / t_student.
    rounds = zip(rates["offline"], rates["online"], rates["student"], rates["teacher"], strict=True)
    savings, limits = zip(
        *((off / on - 1, student / teacher) for off, on, student, teacher in rounds), strict=True
    )
    saving, limit = statistics.median(savings), statistics.median(limits)
    print(f"t_online / t_offline - 1 = {saving:.2f}; t_teacher / t_student = {limit:.2f}")
    print(
        f"the saving is {statistics.median(s / x for s, x in zip(savings, limits, strict=True)):.2f} of the limit"
    )
    return 0


if __name__ == "__main__":
    run_command(main)
