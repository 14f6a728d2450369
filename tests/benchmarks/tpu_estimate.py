"""Estimates what a train step and its input need on a TPU. Nothing here has run on a TPU.

    python -m tests.benchmarks.tpu_estimate                              # one minute; no data, no accelerator
    python -m tests.benchmarks.tpu_estimate --student=bit_r101x3 --sizes=224 --types=v5e-8 --utilization=0.5

Lowers the train step of one replica for XLA (mix, student, loss, gradients, AdamW) and counts its arithmetic from the
shapes of the convolutions and matrix products. Published figures of the chips then give the step time, the host cores
that the input needs at that rate, and the traffic between host and device.

TensorFlow 2.15 has no public cost analysis of a compiled program, and a program compiled for a CPU contains the CPU's
fusions. So arithmetic is counted as XLA's HloCostAnalysis does, in the program before optimization, in which every
convolution is present with its shapes; other operations are below one percent. Memory traffic counts only what no
fusion can avoid: operands and results of convolutions and products, and the optimizer state.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re

import numpy as np
import tensorflow as tf

from pipeline.cli.main import run_command
from pipeline.cli.parser import Parser, batch_size, output_path, positive, positive_number
from pipeline.errors import UserError
from pipeline.storage.files import write_json
from trainer import models
from trainer.config.choices import PRECISIONS, STUDENTS, student_kind
from trainer.config.recipes import TrainRecipe
from trainer.config.run_length import replica_batch_size
from trainer.config.tpu_slices import check_type
from trainer.step.distiller import Distiller
from trainer.step.optimizers import recipe_optimizer
from trainer.step.schedules import WarmupCosine

# Reads of weight, two moments and gradient, writes of weight and moments: float32.
_OPTIMIZER_BYTES = 7 * 4
_ITEM_BYTES = {"f32": 4, "bf16": 2, "f16": 2}

_SHAPE = r"(f32|bf16|f16)\[([\d,]*)\]\S*"
_INSTRUCTION = re.compile(rf"= {_SHAPE} (convolution|dot)\({_SHAPE} [^,]+, {_SHAPE} [^)]+\), (.*)$")


@dataclasses.dataclass(frozen=True)
class Slice:
    """Published figures of a single-host slice.

    Attributes:
      replicas: Number of replicas of TPUStrategy.
      flops: Peak of one replica in bfloat16, 1/s.
      bandwidth: Memory bandwidth of one replica, bytes/s.
      host_cpus: Number of vCPUs of the host.
    """

    replicas: int
    flops: float
    bandwidth: float
    host_cpus: int


# Chips: cloud.google.com/tpu/docs/v3 (123 Tflop/s bfloat16, 900 GB/s, two cores per chip, one replica each) and .../v5e
# (197 Tflop/s bfloat16, 819 GB/s). Hosts: cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus, machine types
# ct3-hightpu-4t (96 vCPUs) and ct5lp-hightpu-8t (224 vCPUs), the hosts of v3-8 and of v5litepod-8.
SLICES = {
    "v3-8": Slice(replicas=8, flops=123e12 / 2, bandwidth=900e9 / 2, host_cpus=96),
    "v5litepod-8": Slice(replicas=8, flops=197e12, bandwidth=819e9, host_cpus=224),
}


@dataclasses.dataclass(frozen=True)
class StepCost:
    """Arithmetic and memory traffic of one step on one replica.

    Attributes:
      flops: Arithmetic of convolutions and matrix products; a multiplication and an addition count as two.
      bytes: Lower bound of the bytes read and written.
      parameters: Number of trainable parameters of the student.
      batch_size: Views per replica, b.
      crops: Crops sent to the device for them, K.
    """

    flops: float
    bytes: float
    parameters: int
    batch_size: int
    crops: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """Step time on a slice, and what the step needs from the host.

    Attributes:
      type: Type of the slice.
      image_size: S.
      batch_size: Views per step of all replicas.
      step_seconds: The longer of arithmetic at the given utilization and memory traffic at full bandwidth.
      bound: `arithmetic` or `memory`, whichever takes longer.
      images_per_second: Views per second.
      cores: Busy host cores by kind of input.
      host_cpus: Number of vCPUs of the host.
      link_bytes_per_second: Crops, partners, ratios and logits, from host to device.
      gflops_an_image: Arithmetic per view.
    """

    type: str
    image_size: int
    batch_size: int
    step_seconds: float
    bound: str
    images_per_second: float
    cores: dict[str, float]
    host_cpus: int
    link_bytes_per_second: float
    gflops_an_image: float


def _dimensions(text: str) -> list[int]:
    return [int(size) for size in text.split(",") if size]


def _find(pattern: str, attributes: str) -> tuple[str, ...]:
    """The groups of a pattern in the attributes of an instruction.

    Raises:
      ValueError: the pattern does not occur. The text of HLO is no interface and may change with TensorFlow.
    """
    if (found := re.search(pattern, attributes)) is None:
        raise ValueError(f"HLO that is not TensorFlow 2.15's: no {pattern} in {attributes}")
    return found.groups()


def _window(attributes: str, name: str, default: int, rank: int) -> list[int]:
    """A number of a convolution's window for each spatial dimension."""
    found = re.search(rf"[{{ ]{name}=([\dx]+)", attributes)
    return [int(size) for size in found.group(1).split("x")] if found else [default] * rank


def _convolution_flops(out: list[int], lhs: list[int], rhs: list[int], attributes: str) -> float:
    """Arithmetic of a convolution, without padding and without the gaps of a dilated operand.

    The same as XLA's HloCostAnalysis: for each spatial dimension, the number of pairs of a window position and an output
    position that meet an element.
    """
    lhs_labels, rhs_labels, out_labels = _find(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    rank = sum(label.isdigit() for label in out_labels)
    stride, lhs_dilation, rhs_dilation = (
        _window(attributes, name, 1, rank) for name in ("stride", "lhs_dilate", "rhs_dilate")
    )
    padding = re.search(r"[{ ]pad=([\d_x-]+)", attributes)
    low = [int(p.split("_")[0]) for p in padding.group(1).split("x")] if padding else [0] * rank
    pairs = 1
    for i in range(rank):
        size = lhs[lhs_labels.index(str(i))]
        positions = np.arange(out[out_labels.index(str(i))])[:, None] * stride[i]
        offsets = np.arange(rhs[rhs_labels.index(str(i))])[None, :] * rhs_dilation[i]
        place = positions + offsets - low[i]
        inside = (place >= 0) & (place <= (size - 1) * lhs_dilation[i]) & (place % lhs_dilation[i] == 0)
        pairs *= int(inside.sum())
    features = out[out_labels.index("f")] * rhs[rhs_labels.index("i")]
    return 2.0 * pairs * out[out_labels.index("b")] * features


def count(hlo: str) -> tuple[float, float]:
    """Counts arithmetic and bytes of the convolutions and matrix products in an HLO program.

    Args:
      hlo: Text of stage `hlo` of `experimental_get_compiler_ir`.

    Returns:
      Flops, and bytes of operands and results.

    Raises:
      ValueError: an instruction has another syntax than that of TensorFlow 2.15.
    """
    flops = size = 0.0
    for line in hlo.splitlines():
        if (found := _INSTRUCTION.search(line)) is None:
            continue
        out_kind, out_shape, operation, lhs_kind, lhs_shape, rhs_kind, rhs_shape, attributes = found.groups()
        out, lhs, rhs = map(_dimensions, (out_shape, lhs_shape, rhs_shape))
        if operation == "convolution":
            flops += _convolution_flops(out, lhs, rhs, attributes)
        else:
            (contracted,) = _find(r"lhs_contracting_dims={([\d,]*)}", attributes)
            flops += 2.0 * math.prod(out) * math.prod(lhs[i] for i in _dimensions(contracted))
        for kind, shape in ((out_kind, out), (lhs_kind, lhs), (rhs_kind, rhs)):
            size += _ITEM_BYTES[kind] * math.prod(shape)
    return flops, size


def step_cost(student: str, image_size: int, *, classes: int, batch_size: int, precision: str) -> StepCost:
    """Lowers the train step of a replica and counts its cost.

    Args:
      student: Name of a built-in student.
      image_size: S.
      classes: C.
      batch_size: Views per replica, b.
      precision: Precision of the convolutions.
    """
    model = models.build_student(student, num_classes=classes, image_size=image_size, precision=precision)
    optimizer = recipe_optimizer(TrainRecipe(learning_rate=0.003, weight_decay=1e-3), WarmupCosine(100, 1))
    optimizer._create_all_weights(model.trainable_variables)
    distiller = Distiller(model, temperature=1.0, temperature_squared=True)
    distiller.compile(optimizer=optimizer)
    crops = batch_size + 2
    batch = {
        "crops": tf.zeros([crops, image_size, image_size, 3], tf.uint8),
        "partner": tf.range(1, batch_size + 1),
        "ratio": tf.ones([batch_size]),
        "logits": tf.zeros([batch_size, classes]),
    }
    step = tf.function(distiller.train_step, jit_compile=True)
    flops, size = count(step.experimental_get_compiler_ir(batch)(stage="hlo"))
    parameters = int(sum(np.prod(variable.shape) for variable in model.trainable_variables))
    return StepCost(flops, size + _OPTIMIZER_BYTES * parameters, parameters, batch_size, crops)


def estimate(
    cost: StepCost,
    kind: str,
    *,
    image_size: int,
    classes: int,
    utilization: float,
    milliseconds: dict[str, float],
) -> Estimate:
    """Estimates the step time on a slice.

    Args:
      cost: Cost of the step on one replica.
      kind: Type of the slice, a key of `SLICES`.
      image_size: S.
      classes: C.
      utilization: Fraction of the peak that convolutions reach.
      milliseconds: Time of one host core per crop, by kind of input.
    """
    chip = SLICES[kind]
    arithmetic, traffic = cost.flops / (chip.flops * utilization), cost.bytes / chip.bandwidth
    seconds = max(arithmetic, traffic)
    crops_per_second = cost.crops * chip.replicas / seconds
    # crops uint8; partner int32, ratio and logits float32
    replica_bytes = cost.crops * image_size**2 * 3 + cost.batch_size * (4 + 4 + 4 * classes)
    return Estimate(
        type=kind,
        image_size=image_size,
        batch_size=cost.batch_size * chip.replicas,
        step_seconds=seconds,
        bound="arithmetic" if arithmetic >= traffic else "memory",
        images_per_second=cost.batch_size * chip.replicas / seconds,
        cores={name: crops_per_second * ms / 1000 for name, ms in milliseconds.items()},
        host_cpus=chip.host_cpus,
        link_bytes_per_second=replica_bytes * chip.replicas / seconds,
        gflops_an_image=cost.flops / cost.batch_size / 1e9,
    )


def _sizes(text: str) -> list[int]:
    return [positive(size) for size in text.split(",")]


def parse(argv: list[str]) -> argparse.Namespace:
    """Parses the flags; `types` are keys of `SLICES`.

    Raises:
      UserError: a flag is unknown or out of range.
    """
    parser = Parser(prog="python -m tests.benchmarks.tpu_estimate", description="Estimates a step on a TPU.")
    add = parser.add_argument
    add("--student", default="bit_r50x1", help=f"Name of a student: {', '.join(sorted(STUDENTS))}.")
    add("--sizes", type=_sizes, default="128,224", help="Image sizes.")
    add("--types", default="v3-8,v5e-8", help=f"TPU types: {', '.join(SLICES)}.")
    add("--classes", type=positive, default=1000, help="Number of classes.")
    add("--batch_size", type=batch_size, default=512, help="Views per step, of all replicas.")
    add("--precision", default="bfloat16", choices=PRECISIONS, help="Precision of the convolutions.")
    add("--utilization", type=positive_number, default=0.4, help="Fraction of the peak that a step reaches.")
    # Flowers102 originals at 128 x 128, on a core of an AMD EPYC; tests/benchmarks/replay_rate.py.
    add("--decode_ms", type=positive_number, default=0.68, help="Core time of decode_and_crop per crop.")
    add("--uncached_ms", type=positive_number, default=1.0, help="Core time of the whole replay per crop.")
    add("--cached_ms", type=positive_number, default=0.3, help="The same with decoded images in memory.")
    # Measured on two cores: 7,000 to 14,000.
    add("--python_views_per_second", type=positive, default=14_000, help="Limit of the input's Python calls.")
    add("--json", type=output_path, help="File for the figures.")
    flags = parser.parse_strictly(argv)
    flags.types = [check_type(name) for name in flags.types.split(",")]
    if unknown := set(flags.types) - set(SLICES):
        raise UserError(f"--types={min(unknown)}: expected types out of {', '.join(SLICES)}")
    student_kind(flags.student)
    if flags.utilization > 1:
        raise UserError(f"--utilization={flags.utilization}: expected a number above 0 and at most 1")
    return flags


def main(argv: list[str]) -> int:
    """Prints a row for each image size and slice."""
    flags = parse(argv)
    milliseconds = {"decode": flags.decode_ms, "replay": flags.uncached_ms, "cached": flags.cached_ms}
    print(
        f"{flags.student}, {flags.precision}, {flags.batch_size} views per step, {flags.classes} classes; "
        f"{flags.utilization:.0%} of peak; estimated, not measured\n"
        f"host cores: {', '.join(f'{name} {ms:g} ms per crop' for name, ms in milliseconds.items())}\n"
    )
    print(
        "type         size  GFLOP/image  step ms  bound       images/s  "
        + "  ".join(f"{name:>6}" for name in milliseconds)
        + "  of vCPUs  link MB/s"
    )
    rows = []
    for size in flags.sizes:
        costs: dict[int, StepCost] = {}
        for kind in flags.types:
            batch = replica_batch_size(flags.batch_size, SLICES[kind].replicas)
            if batch not in costs:
                costs[batch] = step_cost(
                    flags.student, size, classes=flags.classes, batch_size=batch, precision=flags.precision
                )
            row = estimate(
                costs[batch],
                kind,
                image_size=size,
                classes=flags.classes,
                utilization=flags.utilization,
                milliseconds=milliseconds,
            )
            rows.append(row)
            print(_line(row, python_views_per_second=flags.python_views_per_second), flush=True)
    print(
        f"\n* above {flags.python_views_per_second:,} views/s, the limit of the input's Python call per batch"
    )
    if flags.json is not None:
        write_json(flags.json, [dataclasses.asdict(row) for row in rows])
    return 0


def _line(row: Estimate, *, python_views_per_second: int) -> str:
    """A line of the table."""
    return (
        f"{row.type:<12} {row.image_size:>4}  {row.gflops_an_image:>11.1f}  {row.step_seconds * 1e3:>7.1f}  "
        f"{row.bound:<10}  {row.images_per_second:>8,.0f}  "
        + "  ".join(f"{cores:>6.1f}" for cores in row.cores.values())
        + f"  {row.host_cpus:>8}  {row.link_bytes_per_second / 1e6:>9,.0f}"
        + ("  *" if row.images_per_second > python_views_per_second else "")
    )


if __name__ == "__main__":
    run_command(main)
