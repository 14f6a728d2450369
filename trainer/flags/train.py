"""The flags of `trainer.train`, and of the commands that take them as well."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from pipeline.cli.cache_flags import add_cache_flags, add_input_buffer_flag
from pipeline.cli.effects import parse_effective
from pipeline.cli.parser import (
    BY_RECIPE,
    Parser,
    batch_size,
    check_exists,
    file_path,
    number,
    place,
    positive,
    positive_number,
    seed,
    whole,
)
from pipeline.errors import UserError
from pipeline.storage.lock import is_locked
from pipeline.store.layout import check_store
from trainer.config.choices import (
    ARMS,
    DEFAULT_ARM,
    PRECISIONS,
    STRATEGIES,
    STUDENTS,
    TF_CONFIG_EXAMPLE,
    Clip,
    DecayMode,
    check_strategy,
    check_student,
)
from trainer.config.recipes import TRAIN_RECIPES, TrainRecipe, train_recipe
from trainer.flags.effects import TRAIN

# Of a run without an end, which has no twentieth and no tenth. Both sources of the recipes warm up for 1,500 steps
# (docs/training.md, "Recipes"); an evaluation as often as a checkpoint.
ENDLESS_WARMUP_STEPS = 1500
ENDLESS_EVAL_EVERY = 1000
EVAL_BATCH_SIZE = 256


def _epochs(text: str) -> int | float:
    """argparse type: a whole number, 1 or more, or `inf`."""
    if text == "inf":
        return math.inf
    try:
        return positive(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, or inf") from error


def make_parser() -> Parser:
    """The command's flags; those that a recipe sets have no default of their own."""
    parser = Parser(
        prog="python -m trainer.train",
        description="Trains a student on the views and teacher logits of a store.",
    )
    add = parser.add_argument
    add("--store", type=place, required=True, help="directory of the store, or its URL in a bucket")
    add(
        "--workdir",
        type=file_path,
        required=True,
        help="directory for checkpoints, metrics and the trained student",
    )
    add("--teacher", type=place, help="SavedModel or .keras file, to go on online where the store ends")
    add(
        "--arm",
        default=DEFAULT_ARM,
        choices=ARMS,
        help="what the student is trained on; all but the first are there to be compared with it (`trainer.compare`)",
    )
    add(
        "--epochs",
        type=_epochs,
        help="epochs to train; by default what the store holds; `inf`, with --teacher: a warm-up, then a constant rate "
        "until SIGTERM, which saves and exports; --steps or --epochs with a number finish such a run",
    )
    add(
        "--write_back",
        action="store_true",
        help="append the online teacher's logits to the store, whole epochs only, as the precompute would have",
    )
    add("--views_per_shard", type=positive, default=16384, help="of --write_back; at most")
    add("--steps", type=positive, help="steps to train, instead of --epochs")
    add(
        "--follow",
        action="store_true",
        help="train while the store is being written: on the epochs that are published, waiting for more; with --epochs "
        "or --steps",
    )
    add("--seed", type=seed, default=0, help="of the student's initial weights")
    add_shared_flags(parser)
    return parser


def add_shared_flags(parser: Parser) -> None:
    """Flags that one run and a comparison of several take alike."""
    add = parser.add_argument
    add("--data_dir", type=place, help="TFDS data directory; by default the precompute's")
    add_cache_flags(parser)
    add("--recipe", help=f"training half of a recipe: {', '.join(TRAIN_RECIPES)}; flags override it")
    add("--allow_recipe_mismatch", action="store_true", help="train on other views than the recipe's")
    add("--allow_short_run", action="store_true", default=None, help="allow a warm-up as long as the run")
    add(
        "--student",
        help=f"one of {', '.join(sorted(STUDENTS))}; tiny is meant for 32 px, small for 128 px and faster there",
    )
    add("--batch_size", type=batch_size, help="views a step")
    add("--temperature", type=positive_number, help="of the loss; by default the store's")
    add("--temperature_squared", action=argparse.BooleanOptionalAction, help="multiply the loss by T^2")
    add("--learning_rate", type=number, help="at the end of the warm-up")
    add("--weight_decay", type=number, help="a step, at full schedule")
    add("--decay_mode", choices=get_args(DecayMode), help="whether the schedule scales the decay")
    add("--decay_kernels_only", action=argparse.BooleanOptionalAction, help="spare biases and norms")
    add("--clip", choices=get_args(Clip), help="of gradients")
    add("--clip_norm", type=positive_number, help="of gradients")
    add("--epsilon", type=positive_number, help="of AdamW")
    add(
        "--warmup_steps",
        type=whole,
        help=f"linear warm-up; by default a twentieth of the run, or {ENDLESS_WARMUP_STEPS} of one without an end",
    )
    add(
        "--strategy",
        default="default",
        help=f"one of {', '.join(STRATEGIES)}; multiworker: the same command on every machine, with TF_CONFIG such as "
        f"{TF_CONFIG_EXAMPLE}",
    )
    add("--replicas", type=positive, help="of --strategy=mirrored; by default one a GPU")
    add("--tpu", help="of --strategy=tpu: local, on the TPU's own machine, or its name; a slice of one host")
    add(
        "--steps_per_execution",
        type=positive,
        default=1,
        help="steps that are handed to the device at once; what is due in between comes after them",
    )
    add(
        "--jit_compile", action="store_true", help="compile the steps of an execution with XLA; on one device"
    )
    add("--precision", default="float32", choices=PRECISIONS, help="of the student's convolutions")
    add(
        "--sync_batch_norm",
        action="store_true",
        help="batch normalisation over all replicas' views of a step",
    )
    add("--deterministic", action="store_true", help="TensorFlow's deterministic ops: bit-equal runs")
    add(
        "--eval_split",
        help="split that intervals are evaluated on; by default validation, else test, else another held-out one",
    )
    add(
        "--eval_every",
        type=positive,
        help=f"steps between evaluations; by default a tenth of the run, or {ENDLESS_EVAL_EVERY} of one without an end",
    )
    add("--eval_batch_size", type=batch_size, default=EVAL_BATCH_SIZE, help="images at a time")
    add("--log_every", type=positive, default=20, help="steps between lines of metrics.jsonl")
    add("--checkpoint_every", type=positive, default=1000, help="steps; intervals end with one as well")
    add("--image_cache_bytes", type=whole, default=2 << 30, help="for decoded images, if all of them fit")
    add_input_buffer_flag(parser)
    recipe = {field.name for field in dataclasses.fields(TrainRecipe)}
    for action in parser._actions:
        if action.dest in recipe and action.help is not None and "default" not in action.help:
            action.help += BY_RECIPE


def _shared_actions() -> list[argparse.Action]:
    parser = Parser(add_help=False)
    add_shared_flags(parser)
    return parser._actions


def shared_flags(flags: argparse.Namespace) -> dict[str, Any]:
    """The flags of `add_shared_flags` among others, by name."""
    return {action.dest: getattr(flags, action.dest) for action in _shared_actions()}


def shared_arguments(flags: argparse.Namespace) -> list[str]:
    """Arguments that give these flags again, those that have their default left out."""
    out = []
    for action in _shared_actions():
        value = getattr(flags, action.dest)
        if value == action.default:
            continue
        name = f"--{action.dest}"
        if isinstance(value, bool):
            out.append(name if value else f"--no-{action.dest}")
        else:
            out.append(f"{name}={value}")
    return out


def check_combinations(flags: argparse.Namespace) -> None:
    """Refuses flags that exclude each other, or need another.

    Raises:
      UserError: names both.
    """
    if flags.epochs and flags.steps:
        raise UserError("give either --epochs or --steps")
    if flags.jit_compile and flags.strategy != "default":
        raise UserError(
            f"--jit_compile: for one device, --strategy=default; got --strategy={flags.strategy}; leave one of them out (a "
            "TPU's steps are compiled anyway)"
        )
    if flags.follow:
        _check_follow(flags)
    if flags.write_back and flags.teacher is None:
        raise UserError("--write_back needs --teacher: it appends what an online teacher says to the store")
    if flags.write_back and flags.steps_per_execution > 1:
        raise UserError(
            f"--write_back: with --steps_per_execution={flags.steps_per_execution}, whose outputs are the last step's "
            "alone, and every step's logits are needed; leave one of them out"
        )
    if flags.write_back and flags.jit_compile:
        raise UserError(
            "--write_back: with --jit_compile, under which the teacher's last bits are not those that the precompute "
            "writes; leave one of them out, or precompute the epochs"
        )


def _check_follow(flags: argparse.Namespace) -> None:
    for name, default in (("teacher", None), ("arm", DEFAULT_ARM)):
        if (value := getattr(flags, name)) != default:
            raise UserError(
                f"--follow: with --{name}={value}; a run that follows trains on stored views alone: leave one of them out"
            )


def check_flags(flags: argparse.Namespace) -> None:
    """Checks everything that needs neither the store's contents nor TensorFlow.

    Raises:
      UserError: a flag is out of range, excludes another or needs another.
    """
    check_combinations(flags)
    if flags.recipe is not None:
        train_recipe(flags.recipe)
    if flags.student is not None:
        check_student(flags.student)
    check_strategy(flags.strategy, replicas=flags.replicas, tpu=flags.tpu)


def check_paths(flags: argparse.Namespace) -> None:
    """Checks the paths that the flags name.

    Raises:
      UserError: one of them is not there.
    """
    if not (flags.follow and is_locked(Path(flags.store))):  # else it is about to be there
        check_store(flags.store)
    check_exists("--data_dir", flags.data_dir)
    check_exists("--teacher", flags.teacher)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command's flags, and refuses what can be refused without TensorFlow.

    Raises:
      UserError: a flag is unknown or out of range, or a path is missing.
    """
    flags = parse_effective(make_parser(), argv, TRAIN)
    check_flags(flags)
    check_paths(flags)
    return flags
