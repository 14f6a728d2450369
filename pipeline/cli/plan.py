"""The flags of `pipeline.plan`: the precompute's, and its own."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from pipeline.cli.precompute import asks_for_demo, check_flags, check_paths
from pipeline.cli.precompute import make_parser as make_precompute_parser
from pipeline.errors import UserError
from pipeline.flags import Parser, output_path, positive, positive_number

CALIBRATE_SECONDS = 10.0  # start-up excluded


def make_parser() -> Parser:
    """The command's flags."""
    parser = make_precompute_parser()
    parser.prog = "python -m pipeline.plan"
    parser.description = "What a precompute would take. Takes the precompute's flags, and these."
    add = parser.add_argument
    add("--students", type=positive, default=10, help="that are to be trained on the store")
    add("--workers", type=positive, default=1, help="side by side")
    add(
        "--teacher_rate",
        type=positive_number,
        help="views a second of a worker's teacher, in place of measuring",
    )
    add("--precompute_rate", type=positive_number, help="with all else beside it; by default the teacher's")
    add("--num_examples", type=positive, help="with --num_classes, in place of --dataset")
    add("--num_classes", type=positive, help="with --num_examples, in place of --dataset")
    add("--calibrate_seconds", type=positive_number, default=CALIBRATE_SECONDS, help="to measure for")
    add("--json", type=output_path, help="file to write the plan to as well")
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command's flags, and refuses what can be refused without TensorFlow.

    Raises:
      UserError: a flag is unknown or out of range, excludes another, or a path is missing.
    """
    flags = make_parser().parse_strictly(argv)
    check_flags(flags)
    check_paths(flags)
    if flags.teacher_rate is None:
        asks_for_demo(flags, needs_store=False)
        for name in ("precompute_rate", "num_examples", "num_classes"):
            if getattr(flags, name) is not None:
                raise UserError(
                    f"--{name} goes with --teacher_rate: without a teacher's rate, one is measured"
                )
        return flags
    if flags.dataset is not None and (flags.num_examples or flags.num_classes):
        raise UserError("give either --dataset, or --num_examples and --num_classes")
    if flags.dataset is None and (flags.num_examples is None or flags.num_classes is None):
        raise UserError("--teacher_rate needs a data set: --dataset, or --num_examples and --num_classes")
    if (flags.precompute_rate or 0) > flags.teacher_rate:
        raise UserError(
            f"--precompute_rate={flags.precompute_rate:g}: more than --teacher_rate={flags.teacher_rate:g}, which it waits for"
        )
    return flags
