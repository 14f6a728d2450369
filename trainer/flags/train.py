"""Flags of `trainer.train`."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from pipeline.cli.effects import parse_effective
from pipeline.cli.parser import Parser, file_path, place, positive, seed
from pipeline.errors import UserError
from pipeline.storage.lock import is_locked
from trainer.config.choices import ARMS, DEFAULT_ARM, Clip, DecayMode
from trainer.config.libtpu import use_libtpu
from trainer.flags.effects import TRAIN
from trainer.flags.shared import (
    add_shared_flags,
    add_store_flags,
    check_shared_flags,
    check_shared_paths,
    check_stores,
    spelled,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainFlags:
    """Parsed flags of `trainer.train`; `make_parser` documents each."""

    store: list[str]
    store_weights: list[float] | None
    workdir: str
    image_size: int | None
    data_dir: str | None
    teacher: list[str] | None
    arm: str
    epochs: int | float | None
    steps: int | None
    follow: bool
    write_back: bool
    views_per_shard: int
    seed: int
    recipe: str | None
    allow_recipe_mismatch: bool
    allow_short_run: bool | None
    student: str | None
    init: str | None
    batch_size: int | None
    temperature: float | None
    temperature_squared: bool | None
    learning_rate: float | None
    weight_decay: float | None
    decay_mode: DecayMode | None
    decay_kernels_only: bool | None
    clip: Clip | None
    clip_norm: float | None
    epsilon: float | None
    warmup_steps: int | None
    precision: str
    sync_batch_norm: bool
    deterministic: bool
    strategy: str
    replicas: int | None
    tpu: str | None
    eval_split: str | None
    eval_every: int | None
    eval_batch_size: int
    log_every: int
    checkpoint_every: int
    steps_per_execution: int
    jit_compile: bool
    shard_cache_bytes: int
    data_cache_bytes: int
    image_cache_bytes: int
    input_buffer_bytes: int | None


def _epochs(text: str) -> int | float:
    """argparse type: a whole number, 1 or more, or `inf`."""
    if text == "inf":
        return math.inf
    try:
        return positive(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, or inf") from error


def make_parser() -> Parser:
    """The command's parser. Flags that a recipe sets have no default of their own."""
    parser = Parser(
        prog="python -m trainer.train",
        description="Trains a student on the views and teacher logits of a store. The same command continues an interrupted "
        "run.",
        examples=[
            "python -m trainer.train --store=runs/mnist_5k/store --workdir=runs/mnist_5k/student",
            "python -m trainer.train --store=runs/flowers/store --workdir=runs/flowers/student --recipe=bit_flowers_fast",
        ],
    )
    add = parser.group("store").add_argument
    add_store_flags(add, required=True)
    add(
        "--follow",
        action="store_true",
        help="Train while the precompute is running: use published epochs, and wait for more. Needs --epochs or --steps.",
    )
    add(
        "--write_back",
        action="store_true",
        help="Append the online teacher's logits to the store, in whole epochs, as the precompute would. Needs --teacher.",
    )
    add("--views_per_shard", type=positive, default=16384, help="Maximum number of views per appended shard.")
    add = parser.group("run").add_argument
    add(
        "--workdir",
        type=file_path,
        required=True,
        help="Directory for checkpoints, metrics and the trained student.",
    )
    add(
        "--epochs",
        type=_epochs,
        help="Epochs to train for (default: from the recipe, or else all epochs in the store). `inf`, with --teacher, trains "
        "at a constant rate until SIGTERM, which saves and exports.",
    )
    add("--steps", type=positive, help="Steps to train for, instead of --epochs.")
    add("--seed", type=seed, default=0, help="Random seed of the student's initial weights.")
    add(
        "--arm",
        default=DEFAULT_ARM,
        choices=ARMS,
        help="Source of the targets. All but the first are for comparisons; see trainer.compare.",
    )
    add = parser.group("teacher").add_argument
    add(
        "--teacher",
        type=place,
        action="append",
        help="SavedModel directory or .keras file, or its URL: continues online past the end of the store. With several "
        "stores, give one for each, in the same order.",
    )
    add_shared_flags(parser)
    return parser


def check_combinations(flags: argparse.Namespace) -> None:
    """Refuses flags that exclude each other or need another."""
    if flags.epochs and flags.steps:
        raise UserError(
            f"--epochs={flags.epochs} and --steps={flags.steps}: expected one of them; omit the other"
        )
    if flags.jit_compile and flags.strategy != "default":
        raise UserError(
            f"--jit_compile: needs --strategy=default, got --strategy={flags.strategy}; omit one of them (a TPU compiles all "
            "steps anyway)"
        )
    if flags.follow:
        for name, default in (("teacher", None), ("arm", DEFAULT_ARM)):
            if (value := getattr(flags, name)) != default:
                given = value if isinstance(value, list) else [value]
                raise UserError(
                    f"--follow: trains on stored views only, got {spelled(name, given)}; omit one of them"
                )
    if flags.write_back:
        _check_write_back(flags)
    check_stores(flags)


def _check_write_back(flags: argparse.Namespace) -> None:
    if len(flags.store) > 1:
        raise UserError(
            f"--write_back: appends to one store, got {spelled('store', flags.store)}; omit it, or extend the stores with "
            "pipeline.precompute"
        )
    if flags.teacher is None:
        raise UserError("--write_back: needs --teacher, whose logits it appends to the store; pass --teacher")
    if flags.steps_per_execution > 1:
        raise UserError(
            f"--write_back: needs the logits of every step, which --steps_per_execution={flags.steps_per_execution} does not "
            "return; omit one of them"
        )
    if flags.jit_compile:
        raise UserError(
            "--write_back: --jit_compile changes the last bits of the teacher's logits, so that they differ from the "
            "precompute's; omit one of them, or precompute the epochs"
        )


def check_flags(flags: argparse.Namespace) -> None:
    """Checks flags as far as possible without the store and TensorFlow."""
    check_combinations(flags)
    check_shared_flags(flags)


def check_paths(flags: argparse.Namespace) -> None:
    """Checks that the paths of the flags exist."""
    # A running precompute will create the store that is followed.
    waits = [store for store in flags.store if flags.follow and is_locked(Path(store))]
    check_shared_paths(flags, stores=[store for store in flags.store if store not in waits])


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command's flags and checks them as far as possible without TensorFlow."""
    flags = parse_effective(make_parser(), argv, TRAIN)
    check_flags(flags)
    check_paths(flags)
    if flags.tpu == "local":
        use_libtpu()
    return flags
