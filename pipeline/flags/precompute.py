"""The flags of `pipeline.precompute`, which `pipeline.plan` takes as well."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence

from pipeline.cli.cache_flags import (
    DATA_IN_BUCKET,
    add_data_cache_flag,
    add_image_cache_flag,
    add_input_buffer_flag,
)
from pipeline.cli.choices import (
    CODECS,
    DEFAULT_SIGNATURE,
    DEMO_EPOCHS,
    NO_LABELS,
    VALUE_RANGES,
    check_codec,
    check_value_range,
)
from pipeline.cli.effects import Condition, refuse_without_effect
from pipeline.cli.parser import (
    BY_RECIPE,
    Parser,
    batch_size,
    check_exists,
    check_model,
    file_path,
    place,
    positive,
    positive_number,
    whole,
)
from pipeline.errors import UserError
from pipeline.flags import beam as beam_flags
from pipeline.flags import runners
from pipeline.flags.classes import read_class_map, read_class_names
from pipeline.flags.prepared import check_prepared
from pipeline.store.layout import check_store_or_empty
from pipeline.views.eval_crop import EvalCrop
from pipeline.views.policies import POLICIES, change_policy, parameters
from pipeline.views.policies.inception import Inception
from pipeline.views.recipes import VIEW_RECIPES, ViewRecipe, view_recipe


def _area_range(text: str) -> tuple[float, float]:
    """argparse type: two numbers with a comma."""
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text}: expected two shares of the image, such as 0.05,1"
        ) from error
    return low, high


def _mixes(flags: argparse.Namespace) -> bool:
    return view_recipe_of(flags).policy.mixup


_OWN_INPUTS = Condition(
    lambda flags: not (flags.dataset is None and flags.teacher is None),
    "on the embedded default, which has its own data set and teacher",
)
CONDITIONS = {
    "area_range": Condition(
        lambda flags: "area_range" in parameters(type(view_recipe_of(flags).policy)), "on a policy without it"
    ),
    "mixup_block": Condition(_mixes, "without mixup"),
    "mixup_fold": Condition(_mixes, "without mixup"),
    "data_dir": _OWN_INPUTS,
    "data_cache_bytes": DATA_IN_BUCKET,
    **dict.fromkeys(("image_feature", "label_feature", "teacher_output", "teacher_value_range"), _OWN_INPUTS),
    "teacher_signature": Condition(
        lambda flags: flags.teacher is not None and not flags.teacher.endswith(".keras"),
        "without a SavedModel as --teacher",
    ),
    "class_map": Condition(lambda flags: flags.label_feature != NO_LABELS, "with --label_feature=none"),
}


def make_parser() -> Parser:
    """The parser of the precompute's own flags, without Beam's."""
    parser = Parser(
        prog="python -m pipeline.precompute",
        description="Writes a store: seeded augmented views, and the teacher's logits for each. Without --dataset and "
        "--teacher, it uses 5,000 MNIST digits and a small teacher.",
        examples=[
            "python -m pipeline.precompute --epochs=10 --store=runs/mnist_5k/store",
            "python -m pipeline.precompute --dataset=oxford_flowers102 --data_dir=data --teacher=teacher \\",
            "    --store=runs/flowers --recipe=bit --epochs=100 --runner=FnApiRunner --direct_num_workers=4",
        ],
    )
    _add_data_flags(parser)
    _add_teacher_flags(parser)
    _add_view_flags(parser)
    _add_store_flags(parser)
    add_image_cache_flag(parser)
    add_input_buffer_flag(parser)
    add_data_cache_flag(parser)
    add = parser.group("runner", "Any Beam option is accepted as well, such as --runner=NAME.").add_argument
    add(
        "--shared_filesystem",
        action="store_true",
        help="Workers on other machines see --store, --data_dir and --teacher at the same paths (NFS, Lustre).",
    )
    return parser


def _add_data_flags(parser: Parser) -> None:
    add = parser.group("data").add_argument
    add("--dataset", help="TFDS data set NAME[/CONFIG][:VERSION], prepared as ArrayRecord.")
    add("--split", default="train", help="Split to augment.")
    add("--data_dir", type=place, help="TFDS data directory, or its URL in a bucket.")
    add(
        "--image_feature",
        metavar="NAME",
        help="Image feature to augment (default: the supervised or only one).",
    )
    add(
        "--label_feature",
        metavar="NAME|none",
        help="Label feature for accuracies, or none (default: the supervised or only one; none if there is none).",
    )
    add(
        "--eval_splits",
        default="all",
        help="Comma-separated splits or slices to store evaluation logits for, such as validation,train[800:]; or all; or "
        "none.",
    )


def _add_teacher_flags(parser: Parser) -> None:
    add = parser.group("teacher").add_argument
    add("--teacher", type=place, help="SavedModel directory or .keras file, or its URL.")
    add("--teacher_signature", default=DEFAULT_SIGNATURE, help="Signature of a SavedModel.")
    add(
        "--teacher_output",
        metavar="NAME",
        help="Output of a teacher with several (default: the only one, or the one named logits).",
    )
    add("--teacher_value_range", default="0..255", help=f"Range of input pixels: {', '.join(VALUE_RANGES)}.")
    add("--teacher_batch_size", type=batch_size, default=64, help="Teacher batch size.")
    add(
        "--assume_logits",
        action="store_true",
        help="Accept outputs that look like probabilities (all in 0..1, or the same sum in each row) as logits. Rows that "
        "sum to 1 are always refused.",
    )
    add(
        "--assume_value_range",
        action="store_true",
        help="Keep --teacher_value_range even if the teacher's top-1 accuracy is clearly higher with another range.",
    )
    add(
        "--class_names",
        type=file_path,
        metavar="FILE",
        help="Names of the teacher's classes, one per line, for pages and for --class_map.",
    )
    add(
        "--class_map",
        type=file_path,
        metavar="FILE",
        help="CSV of a teacher class and its class of the data set per line, by index or name, for accuracies where the "
        "classes differ. Teacher classes that are not listed are ignored.",
    )


def _add_view_flags(parser: Parser) -> None:
    add = parser.group("views").add_argument
    add("--seed", type=whole, default=0, help="Random seed for all augmentations.")
    add(
        "--recipe",
        help=f"Recipe whose view settings are used: {', '.join(VIEW_RECIPES)}. Other flags override it (default: inception "
        "at 128 pixels with mixup).",
    )
    add("--policy", help=f"Augmentation policy: {', '.join(POLICIES)}." + BY_RECIPE)
    add("--image_size", type=positive, help="Side length of a crop, in pixels." + BY_RECIPE)
    add(
        "--area_range",
        type=_area_range,
        metavar="LOW,HIGH",
        help="Share of the image that an inception crop covers." + BY_RECIPE,
    )
    add("--mixup", choices=("on", "off"), help="Whether views are mixed in pairs." + BY_RECIPE)
    add("--mixup_block", type=positive, help="Number of consecutive views with the same ratio." + BY_RECIPE)
    add(
        "--mixup_fold", action=argparse.BooleanOptionalAction, help="Fold mixup ratios to 0.5..1." + BY_RECIPE
    )


def _add_store_flags(parser: Parser) -> None:
    add = parser.group("store").add_argument
    add("--store", type=place, help="Directory of the store, or its URL in a bucket.")
    add("--epochs", type=positive, default=DEMO_EPOCHS, help="Number of augmented epochs in the store.")
    add("--codec", default="float16", help=f"Codec of the logits: {', '.join(CODECS)}.")
    add(
        "--temperature",
        type=positive_number,
        help="Temperature of the distillation loss: the trainer's default, the only one of a topk store, and the one at which the "
        "codec's error is measured." + BY_RECIPE,
    )
    add("--views_per_shard", type=positive, default=16384, help="Maximum number of views per shard.")
    add(
        "--repair",
        action="store_true",
        help="Recompute published shards that are missing or damaged; each must match the manifest.",
    )


def asks_for_demo(flags: argparse.Namespace, *, needs_store: bool = True) -> bool:
    """Whether the flags ask for the embedded default.

    Args:
      needs_store: whether the command writes a store.

    Raises:
      UserError: only one of data set and teacher is given, or the store is missing.
    """
    if flags.dataset is None and flags.teacher is None:
        return True
    if flags.dataset is None or flags.teacher is None:
        missing = "--dataset" if flags.dataset is None else "--teacher"
        raise UserError(
            f"{missing} is missing: give both --dataset and --teacher, or neither for the embedded default"
        )
    if needs_store and flags.store is None:
        raise UserError("--store is missing: give the directory of the store")
    return False


def announce_demo(flags: argparse.Namespace) -> bool:
    """Whether the flags ask for the embedded default; if so, prints a line about it.

    Raises:
      UserError: see `asks_for_demo`.
    """
    if not asks_for_demo(flags):
        return False
    print(
        "Embedded default: 5,000 MNIST digits (mnist_5k) and a small teacher. "
        "For your own: --dataset=NAME --data_dir=DIR --teacher=PATH --store=DIR",
        flush=True,
    )
    return True


def view_recipe_of(flags: argparse.Namespace) -> ViewRecipe:
    """The recipe that the flags name, or the default one, with the flags that override it.

    Raises:
      UserError: there is no such recipe, or a flag is out of range.
    """
    if flags.recipe is not None:
        base = view_recipe(flags.recipe)
    elif flags.dataset is None and flags.teacher is None:
        base = view_recipe("demo")
    else:
        base = ViewRecipe(policy=Inception(), eval_crop=EvalCrop(), temperature=10.0, source="defaults")
    policy = change_policy(
        base.policy,
        name=flags.policy,
        image_size=flags.image_size,
        area_range=flags.area_range,
        mixup=None if flags.mixup is None else flags.mixup == "on",
        mixup_block=flags.mixup_block,
        mixup_fold=flags.mixup_fold,
    )
    return dataclasses.replace(base, policy=policy)


def check_flags(flags: argparse.Namespace) -> None:
    """Checks values and the files of classes, without loading or creating anything.

    Raises:
      UserError: a flag is out of range, or a file of classes is not as expected.
    """
    if flags.class_names is not None:
        read_class_names(flags.class_names)
    if flags.class_map is not None:
        read_class_map(flags.class_map)
    check_codec(flags.codec)
    check_value_range(flags.teacher_value_range)
    view_recipe_of(flags)


def check_paths(flags: argparse.Namespace) -> None:
    """Checks paths on this machine.

    Raises:
      UserError: a path does not exist.
    """
    check_exists("--data_dir", flags.data_dir)
    check_model("--teacher", flags.teacher)
    if flags.dataset is not None:
        check_prepared(flags.dataset, flags.data_dir)
    if flags.store is not None:
        check_store_or_empty(flags.store)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command's flags, and refuses what can be refused without TensorFlow and Beam.

    Returns:
      The precompute's flags, with Beam's arguments as `beam`.

    Raises:
      UserError: a flag is unknown, out of range or without effect, or a path does not exist.
    """
    parser = make_parser()
    flags, rest = parser.parse_known_args(argv)
    flags.beam = rest
    beam_flags.check(flags.beam, parser)
    asks_for_demo(flags)
    check_flags(flags)
    check_paths(flags)
    refuse_without_effect(parser, argv, flags, conditions=CONDITIONS)
    runners.check(flags, flags.beam)
    return flags
