"""Compares the rate of training steps from a store in a bucket with that of a local store.

    python -m pipeline.precompute --runner=DirectRunner --dataset=oxford_flowers102 --data_dir=DATA --teacher=TEACHER \
        --recipe=bit --epochs=20 --views_per_shard=1020 --store=STORE        # one shard per epoch; one minute
    python -m tests.benchmarks.bucket_rate --store=STORE --data_dir=DATA --student=small --batch_size=64

The bucket is a real S3 server on loopback behind a link of `--latency` seconds and `--link_rate` bytes per second and
connection. The cache has room for four shards. The goal is the rate of the local store if the link is faster than the
student.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tensorflow as tf

from pipeline.cli.main import run_command
from pipeline.cli.parser import number, positive
from pipeline.store.reader import StoreReader
from tests.benchmarks.alternate import measure, median, ratio
from tests.buckets import BUCKET, Fault, FaultyLink, environment, s3_server, upload_tree
from trainer.flags.train import make_parser
from trainer.run.builder import build_run
from trainer.run.options import resolve
from trainer.run.training import Run
from trainer.targets.batches import Targets


def main(argv: list[str]) -> int:
    """Runs the benchmark; takes the flags of the trainer."""
    parser = make_parser()
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--steps_a_round", type=positive, default=40)
    parser.add_argument("--latency", type=number, default=0.05)
    parser.add_argument("--link_rate", type=number, default=2e6)
    with tempfile.TemporaryDirectory() as workdir:
        flags = parser.parse_strictly([*argv, f"--workdir={workdir}"])
        local = StoreReader(flags.store[0])
        run = build_run(resolve(flags, local), local)
    with (
        s3_server() as server,
        FaultyLink(server, lambda *_: Fault(latency=flags.latency, rate=flags.link_rate)) as link,
    ):
        upload_tree(server, Path(flags.store[0]), "store")
        os.environ.update(environment(link.port))
        shard_bytes = max(shard.bytes for shard in local.views.manifest.shards)
        remote = StoreReader(f"s3://{BUCKET}/store", shard_cache_bytes=4 * shard_bytes)
        _compare(run, {"local": local, "bucket": remote}, flags)
        print(f"{link.count('GET', 'views.array_record')} shards of {shard_bytes:,} bytes came over the link")
    return 0


def _compare(run: Run, stores: dict[str, StoreReader], flags: Any) -> None:
    step = run.distiller.make_train_function()
    size, count = run.options.recipe.batch_size, flags.steps_a_round

    def batches(store: StoreReader) -> Iterator[Any]:
        targets = Targets(store, run.dataset, batch_size=size, image_cache_bytes=flags.image_cache_bytes)
        return iter(targets.batches(0, store.views.num_records // size).repeat())

    def train(source: Iterator[tf.Tensor]) -> Callable[[], int]:
        def work() -> int:
            for _ in range(count):
                logs = step(source)
            float(logs["loss"])
            return count * size

        return work

    rates = measure({name: train(batches(store)) for name, store in stores.items()}, rounds=flags.rounds)
    for name, values in rates.items():
        print(f"{name}: median {median(values):,.1f} views/s, {size / median(values):.3f} s per step")
    print(f"bucket: {ratio(rates, 'bucket', 'local'):.3f} of the rate of the local store")


if __name__ == "__main__":
    run_command(main)
