"""What a TPU's step needs: `python -m tests.benchmarks.tpu_estimate`. An estimate: nothing here has run on a TPU.

Lowers the real train step of one replica for XLA (mix, student, loss, gradients, AdamW), counts its arithmetic from
the shapes of its convolutions and matrix products, and works out from published figures of the chips how fast steps
can be, how many of the host's cores the input needs then, and what goes over the link to the device.

    python -m tests.benchmarks.tpu_estimate                                          # a minute; no data, no accelerator
    python -m tests.benchmarks.tpu_estimate --student=bit_r101x3 --sizes=224 --types=v5e-8 --utilisation=0.5

TensorFlow 2.15 has no public cost analysis of a compiled program, and that of a program compiled for a CPU would
count the CPU's fusions. So the arithmetic is counted as XLA's own HloCostAnalysis does it, from the program before it
is optimised, where every convolution is still there with its shapes; what else a step computes is below a percent.
Bytes are those that no fusion can save: operands and results of convolutions and products, and the optimizer's state.
"""

from __future__ import annotations

if __name__ == "__main__":
    from pipeline.cli.main import run_module

    run_module("tests.benchmarks.tpu_estimate", flags="tests.benchmarks.tpu_estimate_flags")

import dataclasses
import math
import re

import numpy as np
import tensorflow as tf

from pipeline.storage.files import write_json
from tests.benchmarks.tpu_estimate_flags import SLICES, parse
from trainer import models
from trainer.distribution.strategy import replica_batch_size
from trainer.step.distiller import Distiller
from trainer.step.optimizers import make_optimizer
from trainer.step.schedules import WarmupCosine

# Reads of weight, two moments and gradient, writes of weight and moments: float32.
_OPTIMIZER_BYTES = 7 * 4
_ITEM_BYTES = {"f32": 4, "bf16": 2, "f16": 2}

_SHAPE = r"(f32|bf16|f16)\[([\d,]*)\]\S*"
_INSTRUCTION = re.compile(rf"= {_SHAPE} (convolution|dot)\({_SHAPE} [^,]+, {_SHAPE} [^)]+\), (.*)$")


@dataclasses.dataclass(frozen=True)
class StepCost:
    """Arithmetic and memory traffic of one replica's step.

    Attributes:
      flops: of convolutions and matrix products; a multiplication and an addition are two.
      bytes: read and written, at least.
      parameters: of the student.
      batch_size: views of the replica, b.
      crops: K, that go to the device for them.
    """

    flops: float
    bytes: float
    parameters: int
    batch_size: int
    crops: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a slice does with a step.

    Attributes:
      type, image_size, batch_size: of all replicas.
      step_seconds: the longer of arithmetic at the stated utilisation and memory traffic at full bandwidth.
      bound: which one that is.
      images_per_second: views.
      cores: of the host that are busy with the input then, by kind of input.
      host_cpus: that it has.
      link_bytes_per_second: crops, partners, ratios and logits, host to device.
      gflops_an_image: arithmetic.
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
    """The groups of a pattern in an instruction's attributes.

    Raises:
      ValueError: they are spelled otherwise; XLA's text is no interface, and may change with TensorFlow.
    """
    if (found := re.search(pattern, attributes)) is None:
        raise ValueError(f"HLO that is not TensorFlow 2.15's: no {pattern} in {attributes}")
    return found.groups()


def _window(attributes: str, name: str, default: int, rank: int) -> list[int]:
    """One number of a convolution's window for each spatial dimension."""
    found = re.search(rf"[{{ ]{name}=([\dx]+)", attributes)
    return [int(size) for size in found.group(1).split("x")] if found else [default] * rank


def _convolution_flops(out: list[int], lhs: list[int], rhs: list[int], attributes: str) -> float:
    """Arithmetic of a convolution without what falls on padding, or between the elements of a dilated operand.

    As XLA's HloCostAnalysis: for each spatial dimension, how many pairs of a window's and an output's position meet an
    element.
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
    """Arithmetic and bytes of the convolutions and matrix products in an HLO program.

    Args:
      hlo: text, stage `hlo` of `experimental_get_compiler_ir`.

    Returns:
      Flops, and bytes of their operands and results.

    Raises:
      ValueError: an instruction is not written as TensorFlow 2.15 does.
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
    """Lowers a replica's train step, and counts.

    Args:
      student: name.
      image_size: S.
      classes: C.
      batch_size: b.
      precision: of the convolutions.
    """
    model = models.build_student(student, num_classes=classes, image_size=image_size, precision=precision)
    optimizer = make_optimizer(
        0.003,
        schedule=WarmupCosine(100, 1),
        weight_decay=1e-3,
        decay_mode="scaled",
        decay_kernels_only=True,
        clip="global",
        clip_norm=1.0,
    )
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
    utilisation: float,
    milliseconds: dict[str, float],
) -> Estimate:
    """What a slice does with a step.

    Args:
      cost: of a replica's step.
      kind: key of `SLICES`.
      image_size: S.
      classes: C.
      utilisation: share of the peak that convolutions reach.
      milliseconds: of a host core for a crop, by kind of input.
    """
    chip = SLICES[kind]
    arithmetic, traffic = cost.flops / (chip.flops * utilisation), cost.bytes / chip.bandwidth
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


def main(argv: list[str]) -> int:
    """The command; see the module's docstring."""
    flags = parse(argv)
    kinds = flags.types
    milliseconds = {"decode": flags.decode_ms, "replay": flags.uncached_ms, "cached": flags.cached_ms}
    print(
        f"{flags.student}, {flags.precision}, {flags.batch_size} views a step, {flags.classes} classes; "
        f"{flags.utilisation:.0%} of peak; estimated, not measured\n"
        f"host cores: {', '.join(f'{name} {ms:g} ms a crop' for name, ms in milliseconds.items())}\n"
    )
    print(
        "type         size  GFLOP/image  step ms  bound       images/s  "
        + "  ".join(f"{name:>6}" for name in milliseconds)
        + "  of vCPUs  link MB/s"
    )
    rows = []
    for size in flags.sizes:
        costs: dict[int, StepCost] = {}
        for kind in kinds:
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
                utilisation=flags.utilisation,
                milliseconds=milliseconds,
            )
            rows.append(row)
            print(
                f"{row.type:<12} {row.image_size:>4}  {row.gflops_an_image:>11.1f}  {row.step_seconds * 1e3:>7.1f}  "
                f"{row.bound:<10}  {row.images_per_second:>8,.0f}  "
                + "  ".join(f"{cores:>6.1f}" for cores in row.cores.values())
                + f"  {row.host_cpus:>8}  {row.link_bytes_per_second / 1e6:>9,.0f}"
                + ("  *" if row.images_per_second > flags.python_views_per_second else ""),
                flush=True,
            )
    print(
        f"\n* more than the {flags.python_views_per_second:,} views/s that the input's one Python call a batch lets "
        "through: the step would wait for it"
    )
    if flags.json is not None:
        write_json(flags.json, [dataclasses.asdict(row) for row in rows])
    return 0
