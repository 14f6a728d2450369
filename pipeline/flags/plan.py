"""The flags of `pipeline.plan`: the precompute's, and its own."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from pipeline.cli.cache_flags import DATA_IN_BUCKET
from pipeline.cli.effects import Condition, never, refuse_without_effect
from pipeline.cli.parser import Parser, output_path, positive, positive_number
from pipeline.errors import UserError
from pipeline.flags.precompute import CONDITIONS as PRECOMPUTE_CONDITIONS
from pipeline.flags.precompute import asks_for_demo, check_flags, check_paths
from pipeline.flags.precompute import make_parser as make_precompute_parser

CALIBRATE_SECONDS = 10.0  # start-up excluded


def make_parser() -> Parser:
    """The command's parser."""
    parser = make_precompute_parser()
    parser.prog = "python -m pipeline.plan"
    parser.description = (
        "Estimates the time, size and cost of a precompute. Takes the precompute's flags, and these."
    )
    parser.set_examples(
        "python -m pipeline.plan --dataset=oxford_flowers102 --data_dir=data --teacher=teacher --epochs=1000",
        "python -m pipeline.plan --num_examples=1281167 --num_classes=1000 --epochs=300 --teacher_rate=900 --workers=8",
    )
    add = parser.group("plan").add_argument
    add("--students", type=positive, default=10, help="Number of students to train on the store.")
    add("--workers", type=positive, default=1, help="Number of parallel workers.")
    add("--calibrate_seconds", type=positive_number, default=CALIBRATE_SECONDS, help="Time to measure for.")
    add(
        "--teacher_rate",
        type=positive_number,
        help="Views per second of one worker's teacher, instead of a measurement.",
    )
    add(
        "--precompute_rate",
        type=positive_number,
        help="Views per second of one worker, input included (default: that of the teacher).",
    )
    add("--num_examples", type=positive, help="Number of training examples, instead of --dataset.")
    add("--num_classes", type=positive, help="Number of classes of the teacher (default: that of --dataset).")
    add("--json", type=output_path, help="File for the plan.")
    return parser


# The precompute's flags that a plan from given rates depends on.
_DATA_FLAGS = {"split", "data_dir", "data_cache_bytes", "eval_splits", "image_feature", "label_feature"}
_STORE_FLAGS = {"dataset", "epochs", "recipe", "codec", "temperature", "views_per_shard"}

MEASURED_CONDITIONS = {
    **PRECOMPUTE_CONDITIONS,
    **dict.fromkeys(
        ("store", "repair", "shared_filesystem", "assume_value_range", "class_names", "class_map"),
        never("on a plan, which writes no store"),
    ),
    **dict.fromkeys(("precompute_rate", "num_examples", "num_classes"), never("without --teacher_rate")),
}


def _conditions_with_given_rates() -> dict[str, Condition]:
    precompute = {action.dest for action in make_precompute_parser()._actions} - {"help", "debug"}
    idle = {*precompute, "calibrate_seconds"} - _DATA_FLAGS - _STORE_FLAGS
    with_dataset = Condition(lambda flags: flags.dataset is not None, "without --dataset")
    return {
        **dict.fromkeys(sorted(idle), never("with --teacher_rate, which replaces the measurement")),
        **dict.fromkeys(sorted(_DATA_FLAGS), with_dataset),
        "data_cache_bytes": DATA_IN_BUCKET,
    }


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command's flags, and refuses what can be refused without TensorFlow.

    Raises:
      UserError: a flag is unknown, out of range or without effect, excludes another, or a path does not exist.
    """
    parser = make_parser()
    flags = parser.parse_strictly(argv)
    check_flags(flags)
    check_paths(flags)
    if flags.teacher_rate is None:
        conditions = MEASURED_CONDITIONS
        asks_for_demo(flags, needs_store=False)
    else:
        conditions = _conditions_with_given_rates()
        _check_given_rates(flags)
    refuse_without_effect(parser, argv, flags, conditions=conditions)
    return flags


def _check_given_rates(flags: argparse.Namespace) -> None:
    if flags.dataset is not None and flags.num_examples:
        raise UserError(
            f"got --dataset={flags.dataset} and --num_examples={flags.num_examples}; give one of them"
        )
    if flags.dataset is None and (flags.num_examples is None or flags.num_classes is None):
        raise UserError("--teacher_rate needs a data set: --dataset, or --num_examples and --num_classes")
    if (flags.precompute_rate or 0) > flags.teacher_rate:
        raise UserError(
            f"--precompute_rate={flags.precompute_rate:g}: expected at most --teacher_rate={flags.teacher_rate:g}, which "
            "limits it"
        )
