"""Compares the rate of the replay with that of `decode_and_crop`, for the same boxes and threads; CPU time of the replay.

    python tests/benchmarks/replay_rate.py --store=DIR [--data_dir=DIR] [--threads=2]

Besides decoding the boxes, the replay reads records and sources, decodes a margin around each box, resizes, computes and
checks the fingerprints of crop and source, and batches.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import tensorflow as tf
from alternate import measure, median, ratio

from pipeline.cli.main import run_command
from pipeline.cli.parser import Parser
from pipeline.inputs.locate import open_dataset
from pipeline.store.reader import StoreReader
from pipeline.views.render import Window, fingerprint32
from trainer.targets.batches import Targets


def cpu_time(work: Callable[[], int]) -> float:
    """CPU seconds per view, of all threads."""
    started = time.process_time()
    views = work()
    return (time.process_time() - started) / views


def main(argv: list[str]) -> int:
    """Runs the benchmark."""
    parser = Parser(prog="replay_rate.py")
    parser.add_argument("--store", required=True)
    parser.add_argument("--data_dir")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=8, help="Batches per round and contender.")
    flags = parser.parse_strictly(argv)
    store = StoreReader(flags.store)
    dataset = open_dataset(store, "views", data_dir=flags.data_dir)
    size, threads = flags.batch_size, flags.threads
    plain = Targets(store, dataset, batch_size=size).input
    cached = Targets(store, dataset, batch_size=size, image_cache_bytes=4 << 30).input
    for _ in cached.batches(np.arange(0, store.spec.num_examples, size)):  # fills the cache
        pass
    starts = np.arange(flags.batches) * size
    views = np.arange(flags.batches * size)
    records = store.views.read(views)
    encoded = tf.constant(dataset.read(records.example))
    boxes = tf.constant(records.box)
    crop_size = store.spec.policy.image_size
    crops = tf.zeros([len(views), crop_size * crop_size * 3], tf.uint8)

    def over_views(function: Callable[..., tf.Tensor]) -> Callable[[], int]:
        def work() -> int:
            elements = tf.data.Dataset.from_tensor_slices((encoded, boxes))
            return sum(1 for _ in elements.map(function, num_parallel_calls=threads).batch(size)) * size

        return work

    def decode_and_crop(data: tf.Tensor, box: tf.Tensor) -> tf.Tensor:
        image = tf.io.decode_and_crop_jpeg(data, box, channels=3, dct_method="INTEGER_ACCURATE")
        return image[0, 0]

    def render(data: tf.Tensor, box: tf.Tensor) -> tf.Tensor:
        return plain.renderer.finish(plain.renderer.cut(data, Window.of(box)))

    def replay(view_input: object) -> Callable[[], int]:
        return lambda: sum(size for _ in view_input.batches(starts, threads=threads))

    def fetch() -> int:
        for start in starts:
            plain.records.fetch(np.arange(start, start + size + 2), plain.source)
        return len(views)

    def fingerprints() -> int:
        fingerprint32(crops).numpy()
        fingerprint32(encoded).numpy()
        return len(views)

    rates = measure(
        {
            "decode_and_crop": over_views(decode_and_crop),
            "cut and resize": over_views(render),
            "fetch (one thread)": fetch,
            "fingerprints (one thread)": fingerprints,
            "replay": replay(plain),
            "replay_cached": replay(cached),
        },
        rounds=flags.rounds,
    )
    for name, values in rates.items():
        print(f"{name}: median {median(values):,.0f} views/s, {1e6 / median(values):,.0f} us per view")
    for name, view_input in (("replay", plain), ("replay_cached", cached)):
        times = [cpu_time(replay(view_input)) for _ in range(flags.rounds)]
        print(f"{name}: median {1e6 * median(times):,.0f} us of CPU time per view")
        print(f"{name}: {ratio(rates, name, 'decode_and_crop'):.2f} of decode_and_crop alone")
    return 0


if __name__ == "__main__":
    run_command(main)
