"""The flags of `trainer.compare`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.cli.effects import never, refuse_without_effect
from pipeline.cli.parser import Parser, check_exists, file_path, place, positive
from pipeline.cli.parser import seed as seed_number
from pipeline.errors import UserError
from pipeline.store.layout import check_store
from trainer.config.choices import ARMS, check_strategy, check_student
from trainer.config.recipes import train_recipe
from trainer.flags.effects import COMPARE, WITH_FROM
from trainer.flags.train import add_shared_flags


def _list_of(parse: Any) -> Any:
    """argparse type: comma-separated values, each once."""

    def parse_all(text: str) -> list[Any]:
        return list(dict.fromkeys(parse(part) for part in text.split(",")))

    return parse_all


def _arm(name: str) -> str:
    if name not in ARMS:
        raise argparse.ArgumentTypeError(f"{name!r}: expected some of {','.join(ARMS)}")
    return name


def make_parser() -> Parser:
    """The command's flags: its own, and those of `trainer.train` that all runs share."""
    parser = Parser(
        prog="python -m trainer.compare",
        description="Trains one student on stored logits, on a live teacher's, and otherwise; compares the runs.",
    )
    add = parser.add_argument
    add("--store", type=place, help="directory of the store; with --from by default the runs' own")
    add("--workdir", type=file_path, required=True, help="directory for the runs, result.json and the report")
    add(
        "--from",
        dest="earlier",
        metavar="DIR[,DIR...]",
        type=_list_of(lambda text: Path(file_path(text))),
        help="train nothing: compare the finished runs of these directories, of comparisons or of runs",
    )
    add(
        "--teacher",
        type=place,
        help="SavedModel or .keras file; by default where the precompute found it",
    )
    add("--arms", type=_list_of(_arm), default="offline,online", help=f"some of {','.join(ARMS)}")
    add(
        "--seeds",
        type=_list_of(seed_number),
        default="0",
        help="of the student's initial weights, such as 0,1,2",
    )
    add(
        "--epochs",
        type=_list_of(positive),
        help="of each run, or several such as 30,100: a run for each; by default what the store holds",
    )
    add("--parallel", type=positive, default=1, help="runs at a time")
    add(
        "--measure",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure a step online and offline, after the training",
    )
    add_shared_flags(parser)
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command's flags, and refuses what can be refused without TensorFlow.

    Raises:
      UserError: a flag is unknown or out of range, or a path is missing.
    """
    parser = make_parser()
    flags = parser.parse_strictly(argv)
    conditions = COMPARE
    if flags.earlier is not None:
        idle = never("with --from, which trains nothing")
        conditions = {action.dest: idle for action in parser._actions if action.dest not in WITH_FROM}
    refuse_without_effect(parser, argv, flags, conditions=conditions)
    if flags.recipe is not None:
        train_recipe(flags.recipe)
    if flags.student is not None:
        check_student(flags.student)
    check_strategy(flags.strategy, replicas=flags.replicas, tpu=flags.tpu)
    if flags.earlier is None:
        _check_comparison(flags)
    else:
        for directory in flags.earlier:
            check_exists("--from", str(directory))
    if flags.store is not None:
        check_store(flags.store)
    check_exists("--data_dir", flags.data_dir)
    check_exists("--teacher", flags.teacher)
    return flags


def _check_comparison(flags: argparse.Namespace) -> None:
    if flags.store is None:
        raise UserError("--store is missing: the directory of the store to train on")
    if flags.strategy == "multiworker":
        raise UserError(
            "--strategy=multiworker: a comparison's runs are processes of one machine; train each arm by `trainer.train "
            "--arm=NAME`, and compare them with --from"
        )
