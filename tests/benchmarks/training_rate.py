"""Compares the rate of training steps with the replay with that of steps on one resident batch.

    python tests/benchmarks/training_rate.py --store=DIR --student=resnet50v2 --batch_size=64

The goal is 0.95 with a student of the size of ResNet50V2 at 128.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable

import tensorflow as tf
from alternate import measure, median, ratio

from pipeline.cli.main import run_command
from pipeline.store.reader import StoreReader
from trainer.flags.train import make_parser
from trainer.run.builder import build_run
from trainer.run.options import resolve


def main(argv: list[str]) -> int:
    """Runs the benchmark; takes the flags of the trainer."""
    parser = make_parser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps_a_round", type=int, default=8)
    with tempfile.TemporaryDirectory() as workdir:
        flags = parser.parse_strictly([*argv, f"--workdir={workdir}"])
        store = StoreReader(flags.store[0])
        run = build_run(resolve(flags, store), store)
    step = run.distiller.make_train_function()
    size, count = run.options.recipe.batch_size, flags.steps_a_round
    # One pipeline over all rounds, the same as in a run; repeated if the store is shorter than the benchmark.
    replayed = iter(run.targets.batches(0, int(run.options.length.steps)).repeat())
    resident = iter(tf.data.Dataset.from_tensors(next(replayed)).repeat())

    def train(batches: object) -> Callable[[], int]:
        def work() -> int:
            for _ in range(count):
                logs = step(batches)
            float(logs["loss"])
            return count * size

        return work

    rates = measure({"resident": train(resident), "replay": train(replayed)}, rounds=flags.rounds)
    for name, values in rates.items():
        print(f"{name}: median {median(values):,.1f} views/s, {size / median(values):.3f} s per step")
    print(f"replay: {ratio(rates, 'replay', 'resident'):.3f} of the step on a resident batch")
    return 0


if __name__ == "__main__":
    run_command(main)
