"""Flags that training commands share, and their checks."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any, get_args

from pipeline.cli.cache_flags import GROUP as PERFORMANCE
from pipeline.cli.cache_flags import add_cache_flags, add_image_cache_flag, add_input_buffer_flag
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
    whole,
)
from pipeline.errors import UserError
from pipeline.store.layout import check_store
from trainer.config.choices import (
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
from trainer.config.recipes import TRAIN_RECIPES, TrainRecipe, train_recipe

# Defaults of endless runs; those of other runs are fractions of the run. The sources of the recipes warm up for 1,500 steps
# (docs/training.md, "Recipes"); evaluations are as frequent as checkpoints.
ENDLESS_WARMUP_STEPS = 1500
ENDLESS_EVAL_EVERY = 1000
EVAL_BATCH_SIZE = 256
STORE_HELP = "Directory of the store, or its URL in a bucket. Give it several times to train on the mean logits of several teachers."


def _weights(text: str) -> list[float]:
    """argparse type: comma-separated numbers above 0."""
    return [positive_number(part) for part in text.split(",")]


def spelled(name: str, values: Sequence[str] | None) -> str:
    """A flag that is given once per value, as on the command line."""
    return " ".join(f"--{name}={value}" for value in values or [])


def add_store_flags(add: Any, *, help: str = STORE_HELP, required: bool = False) -> None:
    """Adds --store, which may be given several times, and --store_weights, by a group's `add_argument`."""
    add("--store", type=place, action="append", required=required, help=help)
    add(
        "--store_weights",
        type=_weights,
        metavar="W,W...",
        help="Weight of each store's logits in the mean, such as 0.7,0.3 (default: equal weights).",
    )


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
        help="Compute precision of the student's convolutions. float16, for GPUs without bfloat16, scales the loss.",
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


def check_shared_flags(flags: argparse.Namespace) -> None:
    """Checks the flags of `add_shared_flags` as far as possible without the store and TensorFlow."""
    if flags.recipe is not None:
        train_recipe(flags.recipe)
    if flags.student is not None:
        student_kind(flags.student)
    check_strategy(flags.strategy, replicas=flags.replicas, tpu=flags.tpu)
    if flags.precision == "float16" and flags.strategy == "tpu":
        raise UserError(
            "--precision=float16: got --strategy=tpu, whose cores compute in bfloat16; use --precision=bfloat16"
        )


def check_shared_paths(flags: argparse.Namespace, *, stores: Sequence[str]) -> None:
    """Checks that stores, data, teachers, and the files of the student and of initial weights exist."""
    for store in stores:
        check_store(store)
    check_exists("--data_dir", flags.data_dir)
    for teacher in flags.teacher or []:
        check_model("--teacher", teacher)
    if flags.student is not None:
        check_student_exists(flags.student)
    check_exists("--init", flags.init)
