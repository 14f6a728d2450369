"""Flags of `trainer.train`, and those that it shares with `trainer.compare`."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from pipeline.cli.cache_flags import GROUP as PERFORMANCE
from pipeline.cli.cache_flags import add_cache_flags, add_image_cache_flag, add_input_buffer_flag
from pipeline.cli.effects import parse_effective
from pipeline.cli.parser import (
    BY_RECIPE,
    Parser,
    batch_size,
    check_exists,
    check_model,
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
    check_student_exists,
    student_kind,
)
from trainer.config.libtpu import use_libtpu
from trainer.config.recipes import TRAIN_RECIPES, TrainRecipe, train_recipe
from trainer.flags.effects import TRAIN

# Defaults of endless runs; those of other runs are fractions of the run. The sources of the recipes warm up for 1,500 steps
# (docs/training.md, "Recipes"); evaluations are as frequent as checkpoints.
ENDLESS_WARMUP_STEPS = 1500
ENDLESS_EVAL_EVERY = 1000
EVAL_BATCH_SIZE = 256


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


STORE_HELP = "Directory of the store, or its URL in a bucket. Give it several times to train on the mean logits of several teachers."
WEIGHTS_HELP = "Weight of each store's logits in the mean, such as 0.7,0.3 (default: equal weights)."


def weights(text: str) -> list[float]:
    """argparse type: comma-separated numbers above 0."""
    return [positive_number(part) for part in text.split(",")]


def spelled(name: str, values: Sequence[str] | None) -> str:
    """A flag that is given once per value, as on the command line."""
    return " ".join(f"--{name}={value}" for value in values or [])


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
    add("--store", type=place, action="append", required=True, help=STORE_HELP)
    add("--store_weights", type=weights, metavar="W,W...", help=WEIGHTS_HELP)
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


def add_shared_flags(parser: Parser) -> None:
    """Adds the flags that `trainer.train` and `trainer.compare` share."""
    add = parser.group("data").add_argument
    add("--data_dir", type=place, help="TFDS data directory, or its URL (default: the precompute's).")
    add(
        "--image_size",
        type=positive,
        help="Side of the student's views in pixels (default: the store's); policies such as inception have views of any size.",
    )
    _add_recipe_flags(parser)
    _add_device_flags(parser)
    add = parser.group("evaluation and logs").add_argument
    add(
        "--eval_split",
        help="Split for evaluations during training (default: validation, or else test, or else another held-out split).",
    )
    add(
        "--eval_every",
        type=positive,
        help=f"Steps between evaluations (default: a tenth of the run; {ENDLESS_EVAL_EVERY} for endless runs).",
    )
    add("--eval_batch_size", type=batch_size, default=EVAL_BATCH_SIZE, help="Images per evaluation batch.")
    add("--log_every", type=positive, default=20, help="Steps between lines of metrics.jsonl.")
    add(
        "--checkpoint_every",
        type=positive,
        default=1000,
        help="Steps between checkpoints; each evaluation adds one.",
    )
    add_cache_flags(parser)
    add_image_cache_flag(parser)
    add_input_buffer_flag(parser)


def _add_recipe_flags(parser: Parser) -> None:
    add = parser.group("recipe").add_argument
    names = ", ".join(TRAIN_RECIPES)
    add(
        "--recipe",
        help=f"Recipe, one of {names}; the flags below override it. docs/recipes.md has the numbers, cost and expected result "
        "of each (default: by the store).",
    )
    add(
        "--allow_recipe_mismatch", action="store_true", help="Allow a store whose views are not the recipe's."
    )
    add("--allow_short_run", action="store_true", default=None, help="Allow a warm-up as long as the run.")
    students = ", ".join(sorted(STUDENTS))
    add(
        "--student",
        help=f"Student, one of {students} (tiny is for 32 pixels, small for 128 pixels); keras:NAME for a model of "
        "tf.keras.applications; package.module:function, called with the number of classes and the image size; or the path of "
        "a .keras file or Keras SavedModel, whose weights are the start.",
    )
    add(
        "--init",
        type=file_path,
        help="Initial weights of --student, by name and then by shape: a BiT .npz, a .keras file, .h5 weights or a SavedModel.",
    )
    add("--batch_size", type=batch_size, help="Views per step.")
    add(
        "--temperature",
        type=positive_number,
        help="Temperature of the loss (default: from the recipe, or else the store's).",
    )
    add("--temperature_squared", action=argparse.BooleanOptionalAction, help="Multiply the loss by T^2.")
    add("--learning_rate", type=number, help="Peak learning rate.")
    add("--weight_decay", type=number, help="Weight decay per step, at the peak learning rate.")
    add("--decay_mode", choices=get_args(DecayMode), help="Whether the schedule scales the weight decay.")
    add(
        "--decay_kernels_only",
        action=argparse.BooleanOptionalAction,
        help="Exclude biases and normalization from weight decay.",
    )
    add("--clip", choices=get_args(Clip), help="Gradient clipping.")
    add("--clip_norm", type=positive_number, help="Maximum norm of clipped gradients.")
    add("--epsilon", type=positive_number, help="Epsilon of AdamW.")
    add(
        "--warmup_steps",
        type=whole,
        help="Steps of linear warm-up (default: from the recipe, or else a twentieth of the run; "
        f"{ENDLESS_WARMUP_STEPS} for endless runs).",
    )
    recipe = {field.name for field in dataclasses.fields(TrainRecipe)}
    for action in parser._actions:
        if action.dest in recipe and action.help is not None and "default" not in action.help:
            action.help += BY_RECIPE


def _add_device_flags(parser: Parser) -> None:
    add = parser.group("devices").add_argument
    add(
        "--strategy",
        default="default",
        help=f"Distribution strategy, one of {', '.join(STRATEGIES)}. multiworker: run the same command on every machine, with "
        f"TF_CONFIG such as {TF_CONFIG_EXAMPLE}.",
    )
    add(
        "--replicas", type=positive, help="Replicas of --strategy=mirrored (default: one per GPU, or else 1)."
    )
    add("--tpu", help="TPU of --strategy=tpu: local, on the TPU's own machine, or its name.")
    add(
        "--precision",
        default="float32",
        choices=PRECISIONS,
        help="Compute precision of the student's convolutions.",
    )
    add(
        "--sync_batch_norm",
        action="store_true",
        help="Batch normalization over the views of all replicas.",
    )
    add("--deterministic", action="store_true", help="Deterministic ops: repeated runs are bit-equal.")
    add = parser.group(PERFORMANCE).add_argument
    add(
        "--steps_per_execution",
        type=positive,
        default=1,
        help="Steps per call of the device; logs and checkpoints wait for the end of a call.",
    )
    add("--jit_compile", action="store_true", help="Compile steps with XLA; needs --strategy=default.")


def _shared_actions() -> list[argparse.Action]:
    parser = Parser(add_help=False)
    add_shared_flags(parser)
    return parser._actions


def shared_flags(flags: argparse.Namespace) -> dict[str, Any]:
    """The flags of `add_shared_flags` among others, by name."""
    return {action.dest: getattr(flags, action.dest) for action in _shared_actions()}


def shared_arguments(flags: argparse.Namespace) -> list[str]:
    """Command-line arguments for the flags of `add_shared_flags` that differ from their defaults."""
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


def check_stores(flags: argparse.Namespace) -> None:
    """Refuses numbers of teachers and weights that differ from that of the stores."""
    stores = list(flags.store)
    if twice := [store for store in stores if stores.count(store) > 1]:
        raise UserError(
            f"--store={twice[0]}: given twice; expected stores of different teachers: omit one of them"
        )
    teachers = getattr(flags, "teacher", None)  # not a flag of every command
    if teachers is not None and len(teachers) != len(stores):
        raise UserError(
            f"{spelled('teacher', teachers)}: expected one per --store, in the same order, for "
            f"{spelled('store', stores)}"
        )
    if flags.store_weights is not None and len(flags.store_weights) != len(stores):
        given = ",".join(f"{weight:g}" for weight in flags.store_weights)
        raise UserError(
            f"--store_weights={given}: expected {len(stores)} numbers, one per --store, in the same order"
        )


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
    if flags.recipe is not None:
        train_recipe(flags.recipe)
    if flags.student is not None:
        student_kind(flags.student)
    check_strategy(flags.strategy, replicas=flags.replicas, tpu=flags.tpu)


def check_paths(flags: argparse.Namespace) -> None:
    """Checks that the paths of the flags exist."""
    for store in flags.store:
        if not (flags.follow and is_locked(Path(store))):  # a running precompute will create it
            check_store(store)
    check_exists("--data_dir", flags.data_dir)
    for teacher in flags.teacher or []:
        check_model("--teacher", teacher)
    check_initial_paths(flags)


def check_initial_paths(flags: argparse.Namespace) -> None:
    """Checks that the student of a path or function exists, and the file of initial weights."""
    if flags.student is not None:
        check_student_exists(flags.student)
    check_exists("--init", flags.init)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command's flags and checks them as far as possible without TensorFlow."""
    flags = parse_effective(make_parser(), argv, TRAIN)
    check_flags(flags)
    check_paths(flags)
    if flags.tpu == "local":
        use_libtpu()
    return flags
