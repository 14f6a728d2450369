"""The flags of `tests.benchmarks.tpu_estimate`, and the slices that it has figures of."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence

from pipeline.cli.parser import Parser, batch_size, output_path, positive, positive_number
from pipeline.errors import UserError
from trainer.config.choices import PRECISIONS, STUDENTS, check_student
from trainer.config.tpu_slices import check_type


@dataclasses.dataclass(frozen=True)
class Slice:
    """A single-host slice, by its published figures.

    Attributes:
      replicas: what TPUStrategy runs a replica on.
      flops: peak of one replica in bfloat16, 1/s.
      bandwidth: of one replica's memory, bytes/s.
      host_cpus: vCPUs of the host.
    """

    replicas: int
    flops: float
    bandwidth: float
    host_cpus: int


# Chips: cloud.google.com/tpu/docs/v3 (123 Tflop/s bfloat16, 900 GB/s, two cores a chip, a replica each) and .../v5e
# (197 Tflop/s bfloat16, 819 GB/s). Hosts: cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus, machine types
# ct3-hightpu-4t (96 vCPUs) and ct5lp-hightpu-8t (224 vCPUs), the hosts of v3-8 and of v5litepod-8.
SLICES = {
    "v3-8": Slice(replicas=8, flops=123e12 / 2, bandwidth=900e9 / 2, host_cpus=96),
    "v5litepod-8": Slice(replicas=8, flops=197e12, bandwidth=819e9, host_cpus=224),
}


def make_parser() -> Parser:
    """The command's flags."""
    parser = Parser(
        prog="python -m tests.benchmarks.tpu_estimate", description="What a step and its input need on a TPU."
    )
    add = parser.add_argument
    add("--student", default="bit_r50x1", help=f"one of {', '.join(sorted(STUDENTS))}")
    add("--sizes", type=_sizes, default=[128, 224], help="image sizes")
    add("--types", default="v3-8,v5e-8", help=f"slices: of {', '.join(SLICES)}")
    add("--classes", type=positive, default=1000)
    add("--batch_size", type=batch_size, default=512, help="views a step, of all replicas")
    add("--precision", default="bfloat16", choices=PRECISIONS)
    add("--utilisation", type=positive_number, default=0.4, help="share of the peak that the step reaches")
    # Flowers102 originals at 128 x 128, on a core of an AMD EPYC; tests/benchmarks/replay_rate.py.
    add("--decode_ms", type=positive_number, default=0.68, help="of a core for decode_and_crop alone, a crop")
    add("--uncached_ms", type=positive_number, default=1.0, help="of a core for the whole replay, a crop")
    add("--cached_ms", type=positive_number, default=0.3, help="the same with decoded images in memory")
    add(
        "--python_views_per_second",
        type=positive,
        default=14_000,
        help="what the input's one Python call a batch lets through: 7,000 to 14,000 measured, on two cores",
    )
    add("--json", type=output_path, help="file for the figures")
    return parser


def _sizes(text: str) -> list[int]:
    return [positive(size) for size in text.split(",")]


def _checked_types(flags: argparse.Namespace) -> list[str]:
    """The slices asked for.

    Raises:
      UserError: a flag is out of range.
    """
    kinds = [check_type(name) for name in flags.types.split(",")]
    if unknown := [kind for kind in kinds if kind not in SLICES]:
        raise UserError(
            f"--types={flags.types}: no figures of {unknown[0]}; there are those of {', '.join(SLICES)}"
        )
    check_student(flags.student)
    if flags.utilisation > 1:
        raise UserError(f"--utilisation={flags.utilisation}: expected more than 0 and at most 1")
    return kinds


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command's flags; `types` are keys of `SLICES`.

    Raises:
      UserError: a flag is unknown or out of range.
    """
    flags = make_parser().parse_strictly(argv)
    flags.types = _checked_types(flags)
    return flags
