"""The flags of `trainer.teacher convert` and `finetune`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from pipeline.cli.cache_flags import add_input_buffer_flag
from pipeline.cli.choices import VALUE_RANGES, check_value_range
from pipeline.cli.effects import parse_effective
from pipeline.cli.parser import (
    Parser,
    batch_size,
    check_exists,
    check_outside,
    file_path,
    number,
    positive,
    seed,
    whole,
)
from pipeline.errors import UserError
from pipeline.views.eval_crop import EvalCrop
from pipeline.views.policies import POLICIES, change_policy
from pipeline.views.policies.base import ViewPolicy
from pipeline.views.policies.light import Light
from pipeline.views.recipes import VIEW_RECIPES, view_recipe
from trainer.config import choices
from trainer.flags.effects import FINETUNE

_IMAGE_SIZE = 128


def make_parser() -> tuple[Parser, dict[str, Parser]]:
    """The command's parser, and those of its two subcommands by name."""
    parser = Parser(
        prog="python -m trainer.teacher",
        description="Makes a teacher for pipeline.precompute: from a published BiT checkpoint, or by fine-tuning "
        "on a data set's labels. `convert --help` and `finetune --help` list the flags of each.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="convert|finetune")
    convert = commands.add_parser(
        "convert",
        help="published BiT .npz to SavedModel",
        description="Converts a published BiT .npz (the paper's names or big_vision's) into a SavedModel. Example: "
        "python -m trainer.teacher convert --npz=BiT-M-R101x3.npz --model=bit_r101x3 --output=runs/teacher",
    )
    add = convert.add_argument
    add("--npz", type=file_path, required=True, help="the checkpoint")
    add("--model", required=True, help=f"what it is a checkpoint of: {', '.join(choices.BIT_MODELS)}")
    add("--num_classes", type=positive, help="by default those of the checkpoint's head")
    add("--new_head", action="store_true", help="begin with a zero head of --num_classes")
    add("--image_size", type=positive, default=_IMAGE_SIZE, help="side of the input in pixels")
    add("--output", type=file_path, required=True, help="directory of the SavedModel")
    finetune = commands.add_parser(
        "finetune",
        help="supervised fine-tuning to SavedModel",
        description="Fine-tunes on a data set's labels by BiT's rule. Without --dataset: 5,000 MNIST digits. Example: "
        "python -m trainer.teacher finetune --dataset=oxford_flowers102 --data_dir=DATA --model=bit_r50x1 "
        "--init=BiT-M-R50x1.npz --output=runs/teacher --workdir=runs/finetune",
    )
    _add_finetune_flags(finetune)
    return parser, {"convert": convert, "finetune": finetune}


def _add_finetune_flags(parser: Parser) -> None:
    add = parser.add_argument
    add("--dataset", help="TFDS data set, NAME[/CONFIG][:VERSION], prepared as ArrayRecord")
    add("--data_dir", type=file_path, help="TFDS data directory")
    add("--split", default="train", help="split to train on")
    add("--model", help=f"network to train: {', '.join(sorted(choices.STUDENTS))}")
    add(
        "--init",
        type=file_path,
        help="weights for --model, but its head: BiT .npz, or Keras SavedModel or .keras of --model",
    )
    add(
        "--teacher",
        type=file_path,
        help="instead of --model: Keras SavedModel or .keras file whose head is replaced",
    )
    add("--teacher_value_range", default="0..255", help=f"of its input: {', '.join(VALUE_RANGES)}")
    add("--head_only", action="store_true", help="train the head alone")
    add("--output", type=file_path, required=True, help="directory of the SavedModel")
    add(
        "--workdir",
        type=file_path,
        required=True,
        help="directory for checkpoints and metrics; the run continues from there",
    )
    add("--steps", type=positive, help="by default 500, 10,000 or 20,000 (20,000 examples or more, 500,000)")
    add("--batch_size", type=batch_size, default=choices.BASE_BATCH_SIZE, help="views a step")
    add("--learning_rate", type=number, default=0.003, help="for 512 views a step; scaled with the batch")
    add("--image_size", type=positive, help="side of a view in pixels; by default 128, the recipe's with one")
    add("--recipe", help=f"views and evaluation crop of: {', '.join(VIEW_RECIPES)} (mixup apart)")
    add("--policy", help=f"how views are drawn: {', '.join(POLICIES)}; by default light, BiT's own")
    add("--flip", action=argparse.BooleanOptionalAction, help="mirror half of the views")
    add("--seed", type=seed, default=0, help="of fresh weights and of the views")
    add("--log_every", type=positive, default=20, help="steps between lines of metrics.jsonl")
    add("--checkpoint_every", type=positive, default=100, help="steps")
    add("--image_cache_bytes", type=whole, default=2 << 30, help="for decoded images, if all of them fit")
    add_input_buffer_flag(parser)


def _check_output(text: str) -> None:
    """The output's path, before any work: only a SavedModel may be replaced."""
    path = Path(text)
    check_outside(path, flag="--output", replaceable="saved_model.pb")
    ours = (path / "saved_model.pb").is_file() or (path.is_dir() and not any(path.iterdir()))
    if path.exists() and not ours:
        raise UserError(f"--output={path}: exists and is no SavedModel; name another directory")


def _check_network_flags(flags: argparse.Namespace) -> None:
    """Refuses what says nothing, or two things, about the network; before anything is loaded."""
    if (flags.model is None) == (flags.teacher is None):
        got = "neither" if flags.model is None else "both"
        raise UserError(f"got {got} of --model and --teacher; name the network to train, or a SavedModel")
    if flags.model is not None and flags.model not in choices.STUDENTS:
        raise UserError(f"--model={flags.model}: expected one of {', '.join(sorted(choices.STUDENTS))}")
    if flags.init is not None and flags.model is None:
        raise UserError(f"--init={flags.init}: needs --model; --teacher brings its own weights")
    if flags.init is not None and flags.init.endswith(".npz") and flags.model not in choices.BIT_MODELS:
        raise UserError(f"--init={flags.init}: a .npz is of a BiT; --model={flags.model} is none")
    check_value_range(flags.teacher_value_range)


def views_of(flags: argparse.Namespace) -> tuple[ViewPolicy, EvalCrop]:
    """Policy and evaluation crop: a recipe's or BiT's own, with the flags that override them."""
    recipe = flags.recipe or ("demo" if flags.dataset is None else None)
    base = Light(image_size=_IMAGE_SIZE) if recipe is None else view_recipe(recipe).policy
    policy = change_policy(
        base,
        name=flags.policy,
        image_size=flags.image_size,
        flip_probability=None if flags.flip is None else 0.5 * flags.flip,
    )
    return policy, EvalCrop() if recipe is None else view_recipe(recipe).eval_crop


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command's flags, and refuses what can be refused without TensorFlow.

    Returns:
      The flags, and the subcommand's name as `command`.

    Raises:
      UserError: a flag is unknown or out of range, or a path is missing.
    """
    parser, commands = make_parser()
    if not argv or argv[0] not in commands:
        parser.parse_strictly(argv)  # --help, or a mistake
        raise UserError("name a command: convert or finetune")
    conditions = FINETUNE if argv[0] == "finetune" else {}
    flags = parse_effective(commands[argv[0]], argv[1:], conditions)
    flags.command = argv[0]
    if flags.command == "convert":
        if flags.model not in choices.BIT_MODELS:
            raise UserError(f"--model={flags.model}: expected one of {', '.join(choices.BIT_MODELS)}")
        check_exists("--npz", flags.npz)
    else:
        _check_network_flags(flags)
        if Path(flags.workdir).resolve().is_relative_to(Path(flags.output).resolve()):
            raise UserError(
                f"--workdir={flags.workdir}: is inside --output={flags.output}, which is replaced as a whole; name a "
                "directory beside it"
            )
        views_of(flags)
        for name in ("data_dir", "init", "teacher"):
            check_exists(f"--{name}", getattr(flags, name))
    _check_output(flags.output)
    return flags
