"""Flags of `trainer.evaluate`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from pipeline.cli.cache_flags import add_cache_flags, add_input_buffer_flag
from pipeline.cli.choices import DEFAULT_SIGNATURE, NO_LABELS, VALUE_RANGES
from pipeline.cli.effects import parse_effective
from pipeline.cli.parser import (
    Parser,
    batch_size,
    check_exists,
    check_model,
    output_path,
    place,
    positive,
    positive_number,
)
from pipeline.errors import UserError
from pipeline.flags.prepared import check_prepared
from pipeline.store.layout import check_store
from pipeline.views.recipes import VIEW_RECIPES, view_recipe
from trainer.config.run_files import STUDENT_DIRECTORY
from trainer.flags.effects import EVALUATE
from trainer.flags.shared import EVAL_BATCH_SIZE, add_store_flags, check_stores

DEFAULT_SPLIT = "test"  # of --dataset


def make_parser() -> Parser:
    """The command's parser."""
    parser = Parser(
        prog="python -m trainer.evaluate",
        description="Evaluates a saved model on the evaluation splits of a store, or on a split of a data set.",
        examples=[
            "python -m trainer.evaluate --student=runs/mnist_5k/student/student --store=runs/mnist_5k/store",
            "python -m trainer.evaluate --student=model.keras --dataset=oxford_flowers102 --data_dir=data --html=page.html",
        ],
    )
    _add_student_flags(parser)
    _add_data_flags(parser)
    add = parser.group("loss").add_argument
    add(
        "--temperature",
        type=positive_number,
        help="Temperature of the distillation loss (default: that of the student's run, or else the store's).",
    )
    add(
        "--temperature_squared",
        action=argparse.BooleanOptionalAction,
        help="Multiply the distillation loss by T^2 (default: as in the student's run, or else no).",
    )
    add = parser.group("output").add_argument
    add("--json", type=output_path, help="File for all figures.")
    add("--html", type=output_path, help="File for a page with the confusions and the calibration.")
    add_cache_flags(parser)
    add_input_buffer_flag(parser)
    parser.group("performance").add_argument(
        "--eval_batch_size", type=batch_size, default=EVAL_BATCH_SIZE, help="Images per batch."
    )
    return parser


def _add_student_flags(parser: Parser) -> None:
    add = parser.group("student").add_argument
    add(
        "--student",
        type=place,
        required=True,
        help="SavedModel directory or .keras file, or its URL; any model of images that returns logits.",
    )
    add("--student_signature", default=DEFAULT_SIGNATURE, help="Signature of a SavedModel.")
    add(
        "--student_output",
        metavar="NAME",
        help="Output of a model with several (default: the only one, or the one named logits).",
    )
    add(
        "--student_value_range",
        default="0..255",
        choices=VALUE_RANGES,
        help="Range of input pixels.",
    )
    add(
        "--image_size",
        type=positive,
        help="Side of the images in pixels (default: what the model's input fixes, or else the store's).",
    )
    add(
        "--assume_logits",
        action="store_true",
        help="Accept outputs that look like probabilities as logits. Rows that sum to 1 are always refused.",
    )


def _add_data_flags(parser: Parser) -> None:
    add = parser.group("data").add_argument
    add_store_flags(
        add,
        help="Directory of a store, or its URL in a bucket, for accuracy, agreement with the teacher and distillation loss. Give it "
        "several times for the mean logits of several teachers.",
    )
    add(
        "--dataset",
        help="Instead of --store: TFDS data set NAME[/CONFIG][:VERSION], prepared as ArrayRecord, for the accuracy alone.",
    )
    add(
        "--split",
        help=f"Split to evaluate on (default: all held-out splits of the store; {DEFAULT_SPLIT} of a data set).",
    )
    add(
        "--data_dir",
        type=place,
        help="TFDS data directory, or its URL (default: the precompute's; with --dataset, that of TFDS).",
    )
    add(
        "--image_feature",
        metavar="NAME",
        help="Image feature of --dataset (default: the supervised or only one).",
    )
    add(
        "--label_feature",
        metavar="NAME",
        help="Label feature of --dataset (default: the supervised or only one).",
    )
    add(
        "--recipe",
        help=f"Recipe whose evaluation crop is used with --dataset: {', '.join(VIEW_RECIPES)} (default: that of bit).",
    )


def _check_student(text: str) -> None:
    """Refuses a path on this machine that is surely no model."""
    exported = Path(text) / STUDENT_DIRECTORY
    if not (Path(text) / "saved_model.pb").exists() and (exported / "saved_model.pb").is_file():
        raise UserError(
            f"--student={text}: expected a SavedModel, got the directory of a run; its student is {exported}"
        )
    check_model("--student", text)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the flags, and checks what can be checked without TensorFlow.

    Raises:
      UserError: a flag is unknown, without effect, or excludes another, or a path does not exist.
    """
    flags = parse_effective(make_parser(), argv, EVALUATE)
    if (flags.store is None) == (flags.dataset is None):
        got = "neither" if flags.store is None else "both"
        raise UserError(
            f"expected either --store or --dataset, got {got}; pass --store=DIR to compare with its teacher, or --dataset=NAME for "
            "the accuracy alone"
        )
    if flags.json is not None and flags.html is not None and flags.json.resolve() == flags.html.resolve():
        raise UserError(
            f"--html={flags.html}: is the file of --json={flags.json} as well; name two different files"
        )
    if flags.label_feature == NO_LABELS:
        raise UserError(
            f"--label_feature={NO_LABELS}: without labels and without a store there is nothing to compute; leave it out"
        )
    if flags.recipe is not None:
        view_recipe(flags.recipe)
    if flags.store is not None:
        check_stores(flags)
    _check_student(flags.student)
    for store in flags.store or []:
        check_store(store)
    check_exists("--data_dir", flags.data_dir)
    if flags.dataset is not None:
        check_prepared(flags.dataset, flags.data_dir)
    return flags
