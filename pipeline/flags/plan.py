"""The flags of `pipeline.plan`: the precompute's, and its own."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence

from pipeline.cli.cache_flags import check_cache_flags
from pipeline.cli.parser import Parser, output_path, positive, positive_number, refuse_without_effect
from pipeline.errors import UserError
from pipeline.flags.precompute import asks_for_demo, check_flags, check_paths, refuse_idle_flags
from pipeline.flags.precompute import make_parser as make_precompute_parser

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
    parser = make_parser()
    flags, given = parser.parse_strictly(argv), parser.given(argv)
    check_flags(flags)
    check_paths(flags)
    refuse_without_effect(given, ["store", "repair", "shared_filesystem"], "on a plan")
    if flags.teacher_rate is None:
        refuse_without_effect(
            given, ["precompute_rate", "num_examples", "num_classes"], "without --teacher_rate"
        )
        asks_for_demo(flags, needs_store=False)
        refuse_idle_flags(flags, given)
    else:
        _check_given_rates(flags, given)
    return flags


# The precompute's flags that a plan from given rates depends on.
_OF_THE_DATA = {"split", "data_dir", "data_cache_bytes", "eval_splits"}
_OF_THE_STORE = {"dataset", "epochs", "recipe", "codec", "temperature", "views_per_shard"}


def _check_given_rates(flags: argparse.Namespace, given: Collection[str]) -> None:
    if flags.dataset is not None and (flags.num_examples or flags.num_classes):
        raise UserError("give either --dataset, or --num_examples and --num_classes")
    if flags.dataset is None and (flags.num_examples is None or flags.num_classes is None):
        raise UserError("--teacher_rate needs a data set: --dataset, or --num_examples and --num_classes")
    if (flags.precompute_rate or 0) > flags.teacher_rate:
        raise UserError(
            f"--precompute_rate={flags.precompute_rate:g}: more than --teacher_rate={flags.teacher_rate:g}, which it waits for"
        )
    all_flags = {action.dest for action in make_precompute_parser()._actions}
    idle = {*all_flags, "calibrate_seconds"} - _OF_THE_DATA - _OF_THE_STORE - {"help", "debug"}
    refuse_without_effect(given, sorted(idle), "with --teacher_rate, for which nothing is run")
    if flags.dataset is None:
        refuse_without_effect(
            given, sorted(_OF_THE_DATA), "with --num_examples, which is all that there is of a data set"
        )
    check_cache_flags(given, store=None, data_dir=flags.data_dir or "")
