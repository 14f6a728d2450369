"""Precompute views/s against the bare teacher and against rendering alone, start-up excluded.

    python tests/benchmarks/precompute_rate.py --dataset=oxford_flowers102 --data_dir=DIR --teacher=DIR

Goals: with the image cache 0.9 of the teacher on a resident batch; without it 0.9 of what teacher and rendering
allow one after the other, 1 / (1 / teacher + 1 / render), since on a CPU they share the cores.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from alternate import measure, median, ratio

from pipeline.errors import run_command
from pipeline.options import announce_demo, make_parser, resolve
from pipeline.store.layout import PENDING, VIEWS_SPLIT
from pipeline.store.shards import ShardTask
from pipeline.worker import PrecomputeJob, ShardWorker


def main(argv: list[str]) -> int:
    """The command; takes the precompute's flags."""
    parser = make_parser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--views", type=int, default=1024, help="a round and contender")
    flags = parser.parse_strictly([*argv, "--store=unused"])
    options = resolve(flags, is_demo=announce_demo(flags))
    size = flags.teacher_batch_size
    with tempfile.TemporaryDirectory() as store:
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
                return worker.compute(task).info.records

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
    print(f"with the image cache: {ratio(rates, 'precompute_cached', 'teacher'):.2f} of the bare teacher")
    share = statistics.median(p / b for p, b in zip(rates["precompute"], bound, strict=True))
    print(f"without it: {share:.2f} of 1 / (1 / teacher + 1 / render)")
    return 0


if __name__ == "__main__":
    run_command(main)
