"""The flags of `pipeline.precompute`, which `pipeline.plan` takes as well."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Collection, Sequence

from pipeline.cli.cache_flags import add_data_cache_flag, add_input_buffer_flag, check_cache_flags
from pipeline.cli.choices import (
    CODECS,
    DEFAULT_SIGNATURE,
    DEMO_EPOCHS,
    VALUE_RANGES,
    check_codec,
    check_value_range,
)
from pipeline.cli.parser import (
    BY_RECIPE,
    Parser,
    batch_size,
    check_exists,
    place,
    positive,
    positive_number,
    refuse_without_effect,
    whole,
)
from pipeline.errors import UserError
from pipeline.flags import beam as beam_flags
from pipeline.flags import runners
from pipeline.views.eval_crop import EvalCrop
from pipeline.views.policies import POLICIES, ViewPolicy
from pipeline.views.recipes import VIEW_RECIPES, ViewRecipe, view_recipe


def _area_range(text: str) -> tuple[float, float]:
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text}: expected two shares of the image, such as 0.05,1"
        ) from error
    return low, high


def make_parser() -> Parser:
    """The precompute's own flags; Beam's come on top."""
    parser = Parser(
        prog="python -m pipeline.precompute",
        description="Writes seeded views and the teacher's logits for them into a store. Any Beam option "
        "is taken as well. With neither --dataset nor --teacher: 5,000 MNIST digits and a small teacher.",
    )
    add = parser.add_argument
    add("--dataset", help="TFDS data set, NAME[/CONFIG][:VERSION], prepared as ArrayRecord")
    add("--split", default="train", help="split that views are of")
    add("--data_dir", type=place, help="TFDS data directory, or its URL in a bucket")
    add_data_cache_flag(parser)
    add("--teacher", type=place, help="SavedModel directory or .keras file, or its URL")
    add("--teacher_signature", default=DEFAULT_SIGNATURE, help="of a SavedModel")
    add("--teacher_value_range", default="0..255", help=f"of its input: {', '.join(VALUE_RANGES)}")
    add("--teacher_batch_size", type=batch_size, default=64, help="views the teacher sees at once")
    add(
        "--assume_logits",
        action="store_true",
        help="the teacher's outputs are logits although they look like probabilities (all in 0..1, or each row with the "
        "same sum); rows that sum to 1 are always refused",
    )
    add(
        "--assume_value_range",
        action="store_true",
        help="go on with --teacher_value_range where the teacher's top-1 is clearly higher with another",
    )
    add("--store", type=place, help="directory of the store, or its URL in a bucket")
    add("--epochs", type=positive, default=DEMO_EPOCHS, help="augmented epochs the store shall hold")
    add("--seed", type=whole, default=0, help="of every draw")
    add(
        "--recipe",
        help=f"view half of a recipe: {', '.join(VIEW_RECIPES)}; flags override it; by default inception at 128 with mixup",
    )
    add("--policy", help=f"how views are drawn: {', '.join(POLICIES)}" + BY_RECIPE)
    add("--image_size", type=positive, help="side of a crop in pixels" + BY_RECIPE)
    add("--area_range", type=_area_range, metavar="LOW,HIGH", help="of inception boxes" + BY_RECIPE)
    add("--mixup", choices=("on", "off"), help="whether views are mixed" + BY_RECIPE)
    add("--mixup_block", type=positive, help="consecutive views that share a ratio" + BY_RECIPE)
    add("--mixup_fold", action=argparse.BooleanOptionalAction, help="fold ratios to 0.5..1" + BY_RECIPE)
    add("--codec", default="float16", help=f"of the logits: {', '.join(CODECS)}")
    add("--temperature", type=positive_number, help="at which the codec's cost is measured" + BY_RECIPE)
    add("--views_per_shard", type=positive, default=16384, help="at most")
    add(
        "--repair",
        action="store_true",
        help="compute published shards again that are missing or damaged; each must be as the manifest says",
    )
    add(
        "--shared_filesystem",
        action="store_true",
        help="workers on other machines see the paths of --store, --data_dir and --teacher (NFS, Lustre)",
    )
    add(
        "--eval_splits",
        default="all",
        help="comma-separated splits or slices to store evaluation logits of, such as validation,train[800:]; all: every split; none",
    )
    add("--image_cache_bytes", type=whole, default=2 << 30, help="for decoded images, per process")
    add_input_buffer_flag(parser)
    return parser


def asks_for_demo(flags: argparse.Namespace, *, needs_store: bool = True) -> bool:
    """Whether the embedded default is asked for.

    Raises:
      UserError: only one of data set and teacher is given, or no store for them.
    """
    if flags.dataset is None and flags.teacher is None:
        return True
    if flags.dataset is None or flags.teacher is None:
        missing = "--dataset" if flags.dataset is None else "--teacher"
        raise UserError(
            f"{missing} is missing: name both --dataset and --teacher, or neither for the embedded default"
        )
    if needs_store and flags.store is None:
        raise UserError("--store is missing: name the directory of the store")
    return False


def announce_demo(flags: argparse.Namespace) -> bool:
    """Whether the embedded default is asked for; if so, prints it as the first line of output.

    Raises:
      UserError: see `asks_for_demo`.
    """
    if not asks_for_demo(flags):
        return False
    print(
        "Embedded default: 5,000 MNIST digits (mnist_5k) and a small teacher. "
        "Your own: --dataset=NAME --data_dir=DIR --teacher=PATH --store=DIR",
        flush=True,
    )
    return True


def check_flags(flags: argparse.Namespace) -> ViewRecipe:
    """The recipe asked for, with the flags that override it.

    Raises:
      UserError: a flag is out of range, which needs nothing to be loaded or made to see.
    """
    check_codec(flags.codec)
    check_value_range(flags.teacher_value_range)
    if flags.recipe is not None:
        base = view_recipe(flags.recipe)
    elif flags.dataset is None and flags.teacher is None:
        base = view_recipe("demo")
    else:
        base = ViewRecipe(policy=ViewPolicy(), eval_crop=EvalCrop(), temperature=10.0, source="defaults")
    given = {
        "name": flags.policy,
        "image_size": flags.image_size,
        "area_range": flags.area_range,
        "mixup": None if flags.mixup is None else flags.mixup == "on",
        "mixup_block": flags.mixup_block,
        "mixup_fold": flags.mixup_fold,
    }
    changed = {name: value for name, value in given.items() if value is not None}
    policy = dataclasses.replace(base.policy, **changed)
    if policy.name != "inception":
        refuse_without_effect(changed, ["area_range"], f"on the views of policy {policy.name}")
    if not policy.mixup:
        refuse_without_effect(changed, ["mixup_block", "mixup_fold"], "without mixup")
    return dataclasses.replace(base, policy=policy)


def check_paths(flags: argparse.Namespace) -> None:
    """Checks the paths that the flags name.

    Raises:
      UserError: one of them is not there.
    """
    check_exists("--data_dir", flags.data_dir)
    check_exists("--teacher", flags.teacher)


def refuse_idle_flags(flags: argparse.Namespace, given: Collection[str]) -> None:
    """Refuses flags that change nothing beside the others.

    Args:
      flags: all of them.
      given: names of those that were given.

    Raises:
      UserError: there is one.
    """
    if flags.dataset is None and flags.teacher is None:
        idle = ("data_dir", "data_cache_bytes", "teacher_signature", "teacher_value_range")
        refuse_without_effect(given, idle, "on the embedded default, which has its own")
    elif flags.teacher is not None and flags.teacher.endswith(".keras"):
        refuse_without_effect(
            given, ["teacher_signature"], f"with --teacher={flags.teacher}: a .keras file has none"
        )
    check_cache_flags(given, store=None, data_dir=flags.data_dir or "")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command's flags, and refuses what can be refused without TensorFlow and Beam.

    Returns:
      Our flags, and the arguments that are Beam's as `beam`.

    Raises:
      UserError: a flag is unknown or out of range, or a path is missing.
    """
    parser = make_parser()
    flags, rest = parser.parse_known_args(argv)
    flags.beam = rest
    beam_flags.check(flags.beam, parser)
    asks_for_demo(flags)
    check_flags(flags)
    refuse_idle_flags(flags, parser.given(argv))
    check_paths(flags)
    runners.check(flags, flags.beam)
    return flags
