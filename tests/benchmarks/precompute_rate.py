"""Compares the rate of the precompute with those of the teacher alone and of rendering alone, without start-up.

    python tests/benchmarks/precompute_rate.py --dataset=oxford_flowers102 --data_dir=DIR --teacher=DIR
    python tests/benchmarks/precompute_rate.py --dataset=oxford_flowers102 --data_dir=DIR --teacher_model=bit_r50x1 \
        --views=128 --rounds=3

With `--teacher_model` the teacher is an architecture with random weights, which do not affect its cost.

Goals with the image cache: 0.9 of the teacher on a resident batch, and 0.95 with a BiT-R50x1 or larger. Goal without it:
0.9 of 1 / (1 / teacher + 1 / render), because teacher and rendering share the cores of a CPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from alternate import measure, median, ratio

from pipeline.cli.main import run_command
from pipeline.flags.precompute import announce_demo, make_parser, view_recipe_of
from pipeline.inputs.dataset import Dataset
from pipeline.precomputing.options import resolve
from pipeline.precomputing.worker import PrecomputeJob, ShardWorker
from pipeline.store.layout import PENDING, VIEWS_SPLIT
from pipeline.store.shards import ShardTask
from trainer import models
from trainer.teacher import export


def main(argv: list[str]) -> int:
    """Runs the benchmark; takes the flags of the precompute."""
    parser = make_parser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--teacher_model", choices=sorted(models.STUDENTS), help="Architecture instead of --teacher."
    )
    parser.add_argument("--views", type=int, default=1024, help="Views per round and contender.")
    flags = parser.parse_strictly([*argv, "--store=unused"])
    size = flags.teacher_batch_size
    with tempfile.TemporaryDirectory() as store:
        if flags.teacher_model is not None:
            flags.teacher = str(_save_teacher(flags, Path(store) / "teacher"))
        options = resolve(flags, is_demo=announce_demo(flags))
        (Path(store) / PENDING).mkdir()
        job = PrecomputeJob(
            store=store,
            spec=options.spec.to_json(),
            data_dir=options.data_dir,
            teacher=options.teacher,
            image_cache_bytes=flags.image_cache_bytes,
        )
        cached, plain = ShardWorker(job), ShardWorker(dataclasses.replace(job, image_cache_bytes=0))
        if not cached.input_of(VIEWS_SPLIT).source.cached:
            raise SystemExit("the images do not fit into --image_cache_bytes")
        resident = next(plain.input_of(VIEWS_SPLIT).batches(np.array([0])))
        starts = np.arange(0, flags.views, size)
        numbers = iter(range(10**6))

        def teacher() -> int:
            for _ in starts:
                plain.run_teacher(resident)
            return len(starts) * size

        def render(worker: ShardWorker) -> Callable[[], int]:
            return lambda: sum(size for _ in worker.input_of(VIEWS_SPLIT).batches(starts))

        def precompute(worker: ShardWorker) -> Callable[[], int]:
            def work() -> int:
                task = ShardTask(split=VIEWS_SPLIT, number=next(numbers), first=0, records=flags.views)
                return worker.run(task).info.records

            return work

        rates = measure(
            {
                "teacher": teacher,
                "render": render(plain),
                "render_cached": render(cached),
                "precompute": precompute(plain),
                "precompute_cached": precompute(cached),
            },
            rounds=flags.rounds,
        )
    bound = [1 / (1 / t + 1 / r) for t, r in zip(rates["teacher"], rates["render"], strict=True)]
    for name, values in rates.items():
        print(f"{name}: median {median(values):,.0f} views/s")
    print(f"with the image cache: {ratio(rates, 'precompute_cached', 'teacher'):.2f} of the teacher alone")
    share = statistics.median(p / b for p, b in zip(rates["precompute"], bound, strict=True))
    print(f"without it: {share:.2f} of 1 / (1 / teacher + 1 / render)")
    return 0


def _save_teacher(flags: argparse.Namespace, path: Path) -> Path:
    """Writes the architecture as a SavedModel for the classes of the data set."""
    image_size = view_recipe_of(argparse.Namespace(**{**vars(flags), "teacher": path})).policy.image_size
    classes = Dataset(flags.dataset, flags.split, data_dir=flags.data_dir).num_classes
    export(
        models.build_student(flags.teacher_model, num_classes=classes, image_size=image_size),
        path,
        image_size=image_size,
    )
    return path


if __name__ == "__main__":
    run_command(main)
