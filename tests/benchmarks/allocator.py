"""Compares the CPU time of a network with `keep_freed_memory` and without, on a resident batch, in turns.

    python tests/benchmarks/allocator.py [--teacher=DIR] [--image_size=128] [--batch_size=64]

Without `--teacher`, the network is a MobileNetV3Small with random weights. Takes about a minute.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from statistics import median

from pipeline.cli.main import run_command
from pipeline.cli.parser import Parser

_CHILD = "--in_child"


def parse(argv: list[str]) -> tuple[str | None, int, int, int, bool]:
    """Teacher, image size, batch size, rounds, and whether this is the process that measures."""
    parser = Parser(prog="allocator.py")
    parser.add_argument("--teacher")
    parser.add_argument("--image_size", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(_CHILD, action="store_true")
    flags = parser.parse_strictly(argv)
    return flags.teacher, flags.image_size, flags.batch_size, flags.rounds, flags.in_child


def forward_passes(teacher: str | None, size: int, batch_size: int, count: int = 8) -> None:
    """Prints user and system time in ms, and page faults, per image."""
    import tensorflow as tf

    if teacher is None:
        model = tf.keras.applications.MobileNetV3Small((size, size, 3), weights=None)
        run = tf.function(lambda image: model(image, training=False))
    else:
        loaded = tf.saved_model.load(teacher)
        (signature,) = loaded.signatures.values()
        (name,) = signature.structured_input_signature[1]
        run = lambda image: signature(**{name: image})  # noqa: E731
    image = tf.random.stateless_uniform([batch_size, size, size, 3], [0, 0], maxval=255.0)
    run(image)
    before = resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(count):
        run(image)
    after = resource.getrusage(resource.RUSAGE_SELF)
    images = count * batch_size
    print(
        1e3 * (after.ru_utime - before.ru_utime) / images,
        1e3 * (after.ru_stime - before.ru_stime) / images,
        (after.ru_minflt - before.ru_minflt) / images,
    )


def main(argv: list[str]) -> int:
    """Runs the benchmark."""
    teacher, size, batch_size, rounds, in_child = parse(argv)
    if in_child:
        from pipeline.cli.allocator import keep_freed_memory

        keep_freed_memory()
        forward_passes(teacher, size, batch_size)
        return 0
    found: dict[str, list[list[float]]] = {"default": [], "keep_freed_memory": []}
    for _ in range(rounds):
        for name, runs in found.items():
            # A setting of the user's, here glibc's own default, keeps `keep_freed_memory` from changing anything.
            settings = {"MALLOC_PERTURB_": "0"} if name == "default" else {}
            child = [sys.executable, __file__, *argv, _CHILD]
            done = subprocess.run(
                child, env=os.environ | settings, stdout=subprocess.PIPE, text=True, check=True
            )
            runs.append([float(value) for value in done.stdout.split()])
    cpu = {}
    for name, runs in found.items():
        user, system, faults = (median(values) for values in zip(*runs, strict=True))
        cpu[name] = user + system
        print(f"{name}: {user:.2f} ms user + {system:.2f} ms system per image, {faults:,.0f} page faults")
    print(f"CPU time: {cpu['keep_freed_memory'] / cpu['default']:.2f} of the default")
    return 0


if __name__ == "__main__":
    run_command(main)
