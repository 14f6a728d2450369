"""The flags of `trainer.teacher convert` and `finetune`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from pipeline.cli.cache_flags import add_input_buffer_flag
from pipeline.cli.choices import NO_LABELS, VALUE_RANGES, check_value_range
from pipeline.cli.effects import parse_effective
from pipeline.cli.parser import (
    Parser,
    batch_size,
    check_exists,
    check_model,
    check_outside,
    file_path,
    number,
    positive,
    seed,
    whole,
)
from pipeline.errors import UserError
from pipeline.flags.prepared import check_prepared
from pipeline.views.eval_crop import EvalCrop
from pipeline.views.policies import POLICIES, change_policy
from pipeline.views.policies.base import ViewPolicy
from pipeline.views.policies.light import Light
from pipeline.views.recipes import VIEW_RECIPES, view_recipe
from trainer.config import choices
from trainer.flags.effects import FINETUNE

_IMAGE_SIZE = 128
_EXAMPLES = (
    "python -m trainer.teacher convert --npz=BiT-M-R101x3.npz --model=bit_r101x3 --output=runs/bit",
    (
        "python -m trainer.teacher finetune --model=small --batch_size=64 --learning_rate=0.4 --steps=600 "
        "--output=runs/mnist_5k/teacher --workdir=runs/mnist_5k/finetune"
    ),
)


def make_parser() -> tuple[Parser, dict[str, Parser]]:
    """The command's parser, and those of its two subcommands by name."""
    parser = Parser(
        prog="python -m trainer.teacher",
        description="Creates a teacher for pipeline.precompute from a published BiT checkpoint, or by fine-tuning on the labels "
        "of a data set. `convert --help` and `finetune --help` list their flags.",
        examples=_EXAMPLES,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="convert|finetune")
    convert = commands.add_parser(
        "convert",
        help="converts a published BiT .npz to a SavedModel",
        description="Converts a published BiT .npz, with the names of the paper or of big_vision, to a SavedModel.",
        examples=[
            _EXAMPLES[0],
            (
                "python -m trainer.teacher convert --npz=BiT-M-R50x1.npz --model=bit_r50x1 --new_head --num_classes=102 "
                "--output=runs/bit_new_head"
            ),
        ],
    )
    _add_convert_flags(convert)
    finetune = commands.add_parser(
        "finetune",
        help="fine-tunes a network on labels and exports a SavedModel",
        description="Fine-tunes a network on the labels of a data set by BiT's rule (BiT-HyperRule) and exports a SavedModel. "
        "Run the same command again to continue after an interruption.",
        examples=[
            _EXAMPLES[1],
            (
                "python -m trainer.teacher finetune --dataset=oxford_flowers102 --data_dir=DATA --model=bit_r50x1 "
                "--init=BiT-M-R50x1.npz --output=runs/teacher --workdir=runs/finetune"
            ),
        ],
    )
    _add_finetune_flags(finetune)
    return parser, {"convert": convert, "finetune": finetune}


def _add_convert_flags(parser: Parser) -> None:
    add = parser.group("network").add_argument
    add("--npz", type=file_path, required=True, help="Published checkpoint, NAME.npz.")
    add(
        "--model",
        required=True,
        help=f"Architecture of the checkpoint, one of {', '.join(choices.BIT_MODELS)}.",
    )
    add("--num_classes", type=positive, help="Number of classes (default: the checkpoint's).")
    add("--new_head", action="store_true", help="Replace the head by a zero head of --num_classes.")
    add("--image_size", type=positive, default=_IMAGE_SIZE, help="Side of the input images in pixels.")
    add = parser.group("output").add_argument
    add("--output", type=file_path, required=True, help="Directory of the SavedModel.")


def _add_finetune_flags(parser: Parser) -> None:
    add = parser.group("data").add_argument
    add(
        "--dataset",
        help="TFDS data set, NAME[/CONFIG][:VERSION], prepared as ArrayRecord (default: 5,000 MNIST digits).",
    )
    add("--data_dir", type=file_path, help="TFDS data directory.")
    add("--split", default="train", help="Split to train on.")
    add(
        "--image_feature",
        metavar="NAME",
        help="Image feature to train on (default: the supervised or only one).",
    )
    add(
        "--label_feature",
        metavar="NAME",
        help="Label feature to train on (default: the supervised or only one).",
    )
    add = parser.group("network").add_argument
    add(
        "--model",
        help=f"Network to train, one of {', '.join(sorted(choices.STUDENTS))}; or keras:NAME for a model of tf.keras.applications.",
    )
    add(
        "--init",
        type=file_path,
        help="Initial weights of --model, except its head: a BiT .npz, a .keras file, .h5 weights or a SavedModel "
        "(default: random).",
    )
    add(
        "--teacher",
        type=file_path,
        help="Keras SavedModel or .keras file to train with a new head, instead of --model.",
    )
    add(
        "--teacher_value_range",
        default="0..255",
        help=f"Range of the pixels that --teacher expects, one of {', '.join(VALUE_RANGES)}.",
    )
    add("--head_only", action="store_true", help="Train only the head.")
    add = parser.group("views").add_argument
    add("--image_size", type=positive, help="Side of a view in pixels (default: 128, or the recipe's).")
    add(
        "--recipe",
        help=f"Recipe of views and evaluation crop, one of {', '.join(VIEW_RECIPES)}; its mixup is off.",
    )
    add("--policy", help=f"View policy, one of {', '.join(POLICIES)} (default: light, or the recipe's).")
    add(
        "--flip",
        action=argparse.BooleanOptionalAction,
        help="Whether to mirror half of the views (default: yes, or the recipe's).",
    )
    add("--seed", type=seed, default=0, help="Random seed of the initial weights and of the views.")
    add = parser.group("training").add_argument
    add(
        "--steps",
        type=positive,
        help="Number of steps (default: 500, or 10,000 from 20,000 examples, or 20,000 from 500,000 examples).",
    )
    add("--batch_size", type=batch_size, default=choices.BASE_BATCH_SIZE, help="Views per step.")
    add(
        "--learning_rate",
        type=number,
        default=0.003,
        help="Peak learning rate for 512 views per step; scaled in proportion to --batch_size.",
    )
    add("--log_every", type=positive, default=20, help="Steps between lines of metrics.jsonl.")
    add("--checkpoint_every", type=positive, default=100, help="Steps between checkpoints.")
    add = parser.group("output").add_argument
    add("--output", type=file_path, required=True, help="Directory of the SavedModel.")
    add(
        "--workdir",
        type=file_path,
        required=True,
        help="Directory of checkpoints and metrics; a run that is there is continued.",
    )
    add = parser.group("performance").add_argument
    add(
        "--image_cache_bytes",
        type=whole,
        default=2 << 30,
        help="Memory for decoded images in bytes, used if all of them fit.",
    )
    add_input_buffer_flag(parser)


def _check_output(text: str) -> None:
    """Checks --output before any work: only a SavedModel may be replaced."""
    path = Path(text)
    check_outside(path, flag="--output", replaceable="saved_model.pb")
    ours = (path / "saved_model.pb").is_file() or (path.is_dir() and not any(path.iterdir()))
    if path.exists() and not ours:
        raise UserError(f"--output={path}: exists and is not a SavedModel; choose another directory")


def _check_network_flags(flags: argparse.Namespace) -> None:
    """Checks the flags of the network before anything is loaded."""
    if (flags.model is None) == (flags.teacher is None):
        got = "neither" if flags.model is None else "both"
        raise UserError(
            f"expected either --model or --teacher, got {got}; pass --model=NAME to train a built-in network, or --teacher=PATH"
        )
    kinds = ("built-in", "keras")
    if flags.model is not None and choices.student_kind(flags.model, parameter="model") not in kinds:
        raise UserError(f"--model={flags.model}: expected a built-in network or keras:NAME")
    if flags.init is not None and flags.model is None:
        raise UserError(
            f"--init={flags.init}: has no effect without --model; the weights of --teacher are its own"
        )
    if flags.init is not None and flags.init.endswith(".npz") and flags.model not in choices.BIT_MODELS:
        raise UserError(
            f"--init={flags.init}: a .npz holds the weights of a BiT, but --model={flags.model} is not one"
        )
    check_value_range(flags.teacher_value_range)


def views_of(flags: argparse.Namespace) -> tuple[ViewPolicy, EvalCrop]:
    """View policy and evaluation crop: the recipe's or BiT's, with the flags that override them."""
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
    """Parses the command's flags and checks what can be checked without TensorFlow.

    Returns:
      The flags, and the subcommand's name as `command`.
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
        if flags.label_feature == NO_LABELS:
            raise UserError(
                f"--label_feature={NO_LABELS}: fine-tuning needs labels; name a label feature, or leave it out"
            )
        if Path(flags.workdir).resolve().is_relative_to(Path(flags.output).resolve()):
            raise UserError(
                f"--workdir={flags.workdir}: is inside --output={flags.output}, which is replaced as a whole; choose a "
                "directory outside it"
            )
        views_of(flags)
        for name in ("data_dir", "init"):
            check_exists(f"--{name}", getattr(flags, name))
        check_model("--teacher", flags.teacher)
        if flags.dataset is not None:
            check_prepared(flags.dataset, flags.data_dir)
    _check_output(flags.output)
    return flags
