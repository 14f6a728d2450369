"""Flags of `trainer.compare`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.cli.effects import never, refuse_without_effect
from pipeline.cli.parser import Parser, check_exists, file_path, place, positive
from pipeline.cli.parser import seed as seed_number
from pipeline.errors import UserError
from trainer.config.choices import ARMS
from trainer.config.libtpu import use_libtpu
from trainer.flags.effects import COMPARE, WITH_FROM
from trainer.flags.shared import (
    STORE_HELP,
    add_shared_flags,
    add_store_flags,
    check_shared_flags,
    check_shared_paths,
    check_stores,
)


def _list_of(parse: Any) -> Any:
    """argparse type: comma-separated values, each once."""

    def parse_all(text: str) -> list[Any]:
        return list(dict.fromkeys(parse(part) for part in text.split(",")))

    return parse_all


def _arm(name: str) -> str:
    if name not in ARMS:
        raise argparse.ArgumentTypeError(f"{name!r}: expected arms out of {','.join(ARMS)}")
    return name


def make_parser() -> Parser:
    """The flags of the command: its own, and those of `trainer.train` that all runs share."""
    parser = Parser(
        prog="python -m trainer.compare",
        description="Trains one student with stored logits, with a live teacher, and in other ways; compares the runs.",
        examples=[
            "python -m trainer.compare --store=runs/mnist_5k/store --workdir=runs/mnist_5k/compare",
            "python -m trainer.compare --workdir=report --from=runs/mnist_5k/compare,runs/other/compare",
        ],
    )
    add = parser.group("comparison").add_argument
    add(
        "--workdir",
        type=file_path,
        required=True,
        help="Directory for the runs, result.json and the report.",
    )
    add("--arms", type=_list_of(_arm), default="offline,online", help=f"Arms to train, of {','.join(ARMS)}.")
    add(
        "--seeds",
        type=_list_of(seed_number),
        default="0",
        help="Random seeds of the student's initial weights, such as 0,1,2.",
    )
    add(
        "--epochs",
        type=_list_of(positive),
        help="Lengths of the runs, such as 30 or 30,100 (default: the epochs of the recipe or the store).",
    )
    add("--parallel", type=positive, default=1, help="Maximum number of simultaneous runs.")
    add(
        "--measure",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Measure the time per step online and offline after the training.",
    )
    add(
        "--from",
        dest="earlier",
        metavar="DIR[,DIR...]",
        type=_list_of(lambda text: Path(file_path(text))),
        help="Directories of finished comparisons or runs to compare, without training.",
    )
    add = parser.group("data").add_argument
    add_store_flags(add, help=f"{STORE_HELP} With --from, by default the stores of the runs.")
    add = parser.group("teacher").add_argument
    add(
        "--teacher",
        type=place,
        action="append",
        help="SavedModel or .keras file of the teacher, one per store (default: the path recorded in each store).",
    )
    add_shared_flags(parser)
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the flags, and checks what can be checked without TensorFlow."""
    parser = make_parser()
    flags = parser.parse_strictly(argv)
    conditions = COMPARE
    if flags.earlier is not None:
        idle = never("with --from, which trains nothing")
        conditions = {action.dest: idle for action in parser._actions if action.dest not in WITH_FROM}
    refuse_without_effect(parser, argv, flags, conditions=conditions)
    check_shared_flags(flags)
    if flags.earlier is None:
        _check_comparison(flags)
    else:
        for directory in flags.earlier:
            check_exists("--from", str(directory))
    check_shared_paths(flags, stores=flags.store or [])
    if flags.tpu == "local":
        use_libtpu()
    return flags


def _check_comparison(flags: argparse.Namespace) -> None:
    if flags.store is None:
        raise UserError("--store: missing; pass the directory of the store to train on")
    check_stores(flags)
    if flags.strategy == "multiworker":
        raise UserError(
            "--strategy=multiworker: the runs of a comparison are processes of one machine; train each arm with "
            "`trainer.train --arm=NAME`, and compare them with --from"
        )
