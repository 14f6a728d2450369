"""Losses against the CPU's, rates of steps and input, and memory, on a machine with a GPU or a TPU.

    python -m tests.benchmarks.accelerator [--output=FILE.json]              # a GPU; planned for less than ten minutes
    python -m tests.benchmarks.accelerator --tpu=local                       # on a TPU VM
    python -m tests.benchmarks.accelerator --small                           # any CPU: shows that it runs, measures nothing

Makes its own data: 510 JPEG files of the size of Flowers102's, imported by `pipeline.dataset`, or those of `--dataset` and
`--data_dir`. Teacher and student are BiT-R50x1 with random weights, since weights do not affect a rate. A store is
precomputed by the command for each of `--image_sizes`. Then, each in a process of its own:

- parity: the first steps of a `--deterministic` run on the CPU and on the accelerator, with and without TF32 on a GPU; the
  largest relative difference of the losses;
- replay: steps as a run makes them; resident: steps on one batch that stays on the device; in turns;
- online: steps with the teacher on the same views;
- input: the replay alone, in views per second, and in seconds of CPU per view, whose inverse is the rate per core;
- memory: TensorFlow's peak on the first GPU, for the offline and the online process. A TPU does not report it.

A stage that fails is a line of the table and makes the exit code 1; the others are run all the same.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from pipeline.cli.environment import grow_device_memory, processor, usable_cpus, versions
from pipeline.cli.main import run_command
from pipeline.cli.parser import Parser, batch_size, check_exists, file_path, number, positive
from pipeline.errors import UserError
from pipeline.errors.causes import first_line
from pipeline.store.combination import open_stores
from tests.benchmarks.accelerator_data import hide_gpus, in_own_process, make_stores
from tests.benchmarks.alternate import measure, median
from trainer import train
from trainer.config.choices import PRECISIONS, STUDENTS
from trainer.config.libtpu import use_libtpu
from trainer.config.run_files import read_metrics
from trainer.distribution.strategy import make_strategy
from trainer.flags.train import parse
from trainer.run.builder import build_run
from trainer.run.options import resolve
from trainer.run.training import Run

_SMALL = {
    "image_sizes": [32],
    "model": "tiny",
    "batch_size": 4,
    "seconds": 0.05,
    "rounds": 1,
    "examples": 12,
    "epochs": 2,
    "parity_steps": 2,
}


def _sizes(text: str) -> list[int]:
    """argparse type: comma-separated sides in pixels."""
    return [positive(part) for part in text.split(",")]


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m tests.benchmarks.accelerator")
    add = parser.add_argument
    add(
        "--small",
        action="store_true",
        help="A small form of everything, on the CPU if there is nothing else.",
    )
    add("--tpu", help="TPU to use: local, on the TPU's own machine, or its name (default: the GPU).")
    add("--dataset", help="Data set of --data_dir, instead of images made here.")
    add("--data_dir", type=file_path, help="TFDS data directory of --dataset.")
    add("--image_sizes", type=_sizes, default=[128, 224], help="Sides of the views.")
    add("--model", default="bit_r50x1", choices=sorted(STUDENTS), help="Architecture of student and teacher.")
    add("--batch_size", type=batch_size, default=64, help="Views per step.")
    add("--precision", default="float32", choices=PRECISIONS, help="Of the student.")
    add("--jit_compile", action="store_true", help="Compile steps with XLA.")
    add("--seconds", type=number, default=2.0, help="Seconds per turn.")
    add("--rounds", type=positive, default=5, help="Turns per contender.")
    add("--examples", type=positive, default=510, help="Number of images to make.")
    add("--epochs", type=positive, default=40, help="Epochs of the stores.")
    add("--parity_steps", type=positive, default=8, help="Steps whose losses are compared.")
    add("--output", type=file_path, help="JSON file for the figures.")
    if "--small" in argv:
        parser.set_defaults(**_SMALL)
    flags = parser.parse_strictly(argv)
    if (flags.dataset is None) != (flags.data_dir is None):
        raise UserError("--dataset and --data_dir: expected both or neither")
    check_exists("--data_dir", flags.data_dir)
    return flags


def _device(tpu: str | None) -> dict[str, Any]:
    """Name and details of the accelerator; of the CPU if there is none."""
    if tpu is not None:
        make_strategy("tpu", tpu=tpu)
        return {"kind": "TPU", "name": tpu, "count": len(tf.config.list_logical_devices("TPU"))}
    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        return {"kind": "CPU", "name": processor(), "count": 1}
    details = tf.config.experimental.get_device_details(gpus[0])
    capability = ".".join(map(str, details.get("compute_capability", ())))
    name = details.get("device_name", "GPU")
    return {"kind": "GPU", "name": name, "compute_capability": capability, "count": len(gpus)}


# Parity.


def _losses(argv: list[str], workdir: Path, cpu: bool, tf32: bool) -> list[float]:
    """Losses of the steps of a run, on the CPU or on what there is."""
    if cpu:
        hide_gpus()
    tf.config.experimental.enable_tensor_float_32_execution(tf32)
    train.main([*argv, f"--workdir={workdir}", "--deterministic", "--log_every=1"])
    return [line["loss"] for line in read_metrics(workdir) if line["kind"] == "train"]


def _parity(argv: list[str], root: Path, wanted: list[float], *, kind: str) -> dict[str, Any]:
    """Largest relative difference of the losses of a run from the CPU's, by setting."""
    cases = {
        "GPU": {"gpu, float32": (False, False), "gpu, TF32": (False, True)},
        "TPU": {"tpu": (False, False)},
        "CPU": {"cpu, again": (True, False)},
    }[kind]
    difference = {}
    for name, setting in cases.items():
        losses = np.array(in_own_process(_losses, argv, root / f"parity_{len(difference)}", *setting))
        difference[name] = float(np.abs(losses / wanted - 1).max())
    return {"steps": len(wanted), "losses_cpu": wanted, "largest_relative_difference": difference}


# Rates.


def _iterator(run: Run, steps: int) -> Iterator[Any]:
    """The batches of the first steps of a run, repeated without end."""
    if run.strategy is tf.distribute.get_strategy():
        return iter(run.targets.batches(0, steps).repeat())
    return iter(
        run.strategy.distribute_datasets_from_function(
            lambda context: run.targets.batches(0, steps, context=context).repeat()
        )
    )


def _resident_step(run: Run, *, jit_compile: bool) -> Callable[[], Any]:
    """A step on a batch that stays on the device."""
    batch = next(_iterator(run, 1))
    if gpus := tf.config.list_logical_devices("GPU"):
        with tf.device(gpus[0].name):
            batch = tf.nest.map_structure(tf.identity, batch)

    @tf.function(jit_compile=jit_compile)
    def step(batch: Any) -> Any:
        return run.strategy.run(run.distiller.train_step, args=(batch,))["loss"]

    return lambda: run.strategy.experimental_local_results(step(batch))[0]


def _turn(step: Callable[[], Any], *, seconds: float, size: int) -> Callable[[], int]:
    """Work of about `seconds`, after the steps that trace and fill queues."""
    for _ in range(2):
        float(step())
    started = time.perf_counter()
    float(step())
    count = max(1, round(seconds / (time.perf_counter() - started)))

    def work() -> int:
        for _ in range(count):
            loss = step()
        float(loss)  # waits for the device
        return count * size

    return work


def _rates(argv: list[str], seconds: float, rounds: int) -> dict[str, Any]:
    """Median views per second of each contender of a run, and the peak of device memory in bytes."""
    with tempfile.TemporaryDirectory() as workdir:
        flags = parse([*argv, f"--workdir={workdir}"])
        strategy = make_strategy(flags.strategy, tpu=flags.tpu)
        store = open_stores(flags.store)
        tf.keras.utils.set_random_seed(0)
        run = build_run(resolve(flags, store), store, strategy=strategy)
    size, steps = run.options.recipe.batch_size, int(run.options.length.steps)
    train_step, batches = run.distiller.make_train_function(), _iterator(run, steps)

    def replay() -> Any:
        return train_step(batches)["loss"]

    contenders = {flags.arm: _turn(replay, seconds=seconds, size=size)}
    if flags.arm == "offline":
        resident = _resident_step(run, jit_compile=flags.jit_compile)
        contenders["resident"] = _turn(resident, seconds=seconds, size=size)
    found: dict[str, Any] = {
        "views_per_second": {k: median(v) for k, v in measure(contenders, rounds=rounds).items()}
    }
    if tf.config.list_logical_devices("GPU"):
        found["peak_device_bytes"] = tf.config.experimental.get_memory_info("GPU:0")["peak"]
    if flags.arm == "offline":
        found["input"] = _input_rate(run, steps, seconds=seconds * rounds)
    return found


def _input_rate(run: Run, steps: int, *, seconds: float) -> dict[str, float]:
    """Views per second of the replay alone, and its seconds of CPU per view."""
    batches = iter(run.targets.batches(0, steps).repeat())
    next(batches)
    views, started, used = 0, time.perf_counter(), time.process_time()
    while not views or time.perf_counter() - started < seconds:
        next(batches)
        views += run.options.recipe.batch_size
    wall, cpu = time.perf_counter() - started, time.process_time() - used
    return {"views_per_second": views / wall, "cpu_seconds_per_view": cpu / views}


# Report.


def _measure(flags: argparse.Namespace, root: Path) -> dict[str, Any]:
    device = {} if flags.tpu else in_own_process(_device, None)
    if device.get("kind") == "CPU" and not flags.small:
        raise UserError("found no GPU; expected one, or --tpu, or --small to run on the CPU")
    result: dict[str, Any] = {
        "processor": processor(),
        "cores": usable_cpus(),
        "versions": versions(),
        "flags": {name: value for name, value in vars(flags).items() if name != "output"},
        "rates": {},
        "failed": {},
    }

    def attempt(name: str, work: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        try:
            return work(*arguments, **named)
        except Exception as error:  # noqa: BLE001  any, of an unknown machine: the other stages are measured all the same
            result["failed"][name] = f"{type(error).__name__}: {first_line(error)}"
            return None

    stores = make_stores(flags, root)
    steps = [*stores[flags.image_sizes[0]], f"--steps={flags.parity_steps}"]
    on_cpu = attempt("losses on the CPU", in_own_process, _losses, steps, root / "parity_cpu", True, False)
    extra = [f"--precision={flags.precision}", *(["--jit_compile"] if flags.jit_compile else [])]
    strategy = []
    if flags.tpu:
        if flags.tpu == "local":  # not earlier: a process that loads libtpu takes the TPU
            use_libtpu()
        device, strategy = in_own_process(_device, flags.tpu), ["--strategy=tpu", f"--tpu={flags.tpu}"]
    result["device"] = device
    result["parity"] = on_cpu and attempt(
        "parity", _parity, [*steps, *strategy], root, on_cpu, kind=device["kind"]
    )
    for size, argv in stores.items():
        online = ["--arm=online", f"--teacher={root / f'teacher_{size}'}"]
        result["rates"][str(size)] = {
            arm: attempt(
                f"{arm} at {size}",
                in_own_process,
                *(_rates, [*argv, *extra, *strategy, *more], flags.seconds, flags.rounds),
            )
            for arm, more in {"offline": [], "online": online}.items()
        }
    return result


def _table(result: dict[str, Any]) -> Iterator[str]:
    """Lines of the table."""
    flags, device = result["flags"], result["device"]
    details = f", compute capability {device['compute_capability']}" if "compute_capability" in device else ""
    yield f"{device['count']} x {device['name']}{details}; {result['cores']} cores of {result['processor']}"
    yield (
        f"{flags['model']}, {flags['batch_size']} views per step, {flags['precision']}"
        f"{', XLA' if flags['jit_compile'] else ''}; TensorFlow {result['versions']['tensorflow']}"
    )
    if parity := result["parity"]:
        for name, value in parity["largest_relative_difference"].items():
            yield f"losses of {parity['steps']} steps, {name} against cpu: largest relative difference {value:.1e}"
    yield "| pixels | steps | steps/s | views/s | ms per step | peak device memory |"
    yield "| ---: | --- | ---: | ---: | ---: | ---: |"
    for size, arms in result["rates"].items():
        for arm in filter(None, arms.values()):
            peak = arm.get("peak_device_bytes")
            memory = "not reported" if peak is None else f"{peak / 1e9:.2f} GB"
            for name, views in arm["views_per_second"].items():
                steps = views / flags["batch_size"]
                shown = {"offline": "replay"}.get(name, name)
                yield f"| {size} | {shown} | {steps:.2f} | {views:,.0f} | {1e3 / steps:,.1f} | {memory} |"
    for size, arms in result["rates"].items():
        if arms["offline"]:
            rate = arms["offline"]["input"]
            cost = rate["cpu_seconds_per_view"]
            yield (
                f"input at {size}: {rate['views_per_second']:,.0f} views/s; {1e3 * cost:.2f} ms of CPU per view, "
                f"{1 / cost:,.0f} views/s per core"
            )
    for name, reason in result["failed"].items():
        yield f"failed: {name}: {reason}"


def main(argv: list[str]) -> int:
    """Runs the benchmark."""
    flags = _parse(argv)
    with tempfile.TemporaryDirectory() as root:
        result = _measure(flags, Path(root))
    print("\n".join(_table(result)))
    text = json.dumps(result, indent=1, default=str)
    print(text)
    if flags.output is not None:
        Path(flags.output).write_text(text + "\n")
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    grow_device_memory()
    run_command(main)
