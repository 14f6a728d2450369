"""Flags of the precompute, parsed once and strictly, and the spec that they ask for."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from pathlib import Path

from pipeline import demo, machine
from pipeline.cache import add_data_cache_flag, add_input_buffer_flag
from pipeline.dataset import Dataset
from pipeline.errors import UserError
from pipeline.flags import Parser, batch_size, place, positive, positive_number, whole
from pipeline.store.codecs import CODECS, check_codec
from pipeline.store.spec import Provenance, Spec
from pipeline.teacher import DEFAULT_SIGNATURE, VALUE_RANGES, Teacher
from pipeline.views.policies import POLICIES, ViewPolicy
from pipeline.views.recipes import VIEW_RECIPES, ViewRecipe, view_recipe
from pipeline.views.render import EvalCrop, render_probe

DEMO_STORE = "runs/mnist_5k/store"


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
    add("--store", type=place, help="directory of the store, or its URL in a bucket")
    add("--epochs", type=positive, default=demo.EPOCHS, help="augmented epochs the store shall hold")
    add("--seed", type=whole, default=0, help="of every draw")
    add("--recipe", help=f"view half of a recipe: {', '.join(VIEW_RECIPES)}; flags override it")
    add("--policy", help=f"how views are drawn: {', '.join(POLICIES)}")
    add("--image_size", type=positive, help="side of a crop in pixels")
    add("--area_range", type=_area_range, metavar="LOW,HIGH", help="of inception boxes")
    add("--mixup", choices=("on", "off"), help="whether views are mixed")
    add("--mixup_block", type=positive, help="consecutive views that share a ratio")
    add("--mixup_fold", action=argparse.BooleanOptionalAction, help="fold ratios to 0.5..1")
    add("--codec", default="float16", help=f"of the logits: {', '.join(CODECS)}")
    add("--temperature", type=positive_number, help="at which the codec's cost is measured")
    add("--views_per_shard", type=positive, default=16384, help="at most")
    add(
        "--repair",
        action="store_true",
        help="compute published shards again that are missing or damaged; each must be as the manifest says",
    )
    add("--eval_splits", default="all", help="comma-separated splits to store evaluation logits of")
    add("--image_cache_bytes", type=whole, default=2 << 30, help="for decoded images, per process")
    add_input_buffer_flag(parser)
    return parser


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrecomputeOptions:
    """What was asked of a precompute, resolved.

    Attributes:
      is_demo: the embedded default is used.
      store, data_dir, teacher: paths or URLs.
      epochs: that the store shall hold, in all.
      views_per_shard: at most.
      image_cache_bytes: per process.
      input_buffer_bytes: for batches that are rendered ahead, per process; None is a quarter of the memory.
      data_cache_bytes: for copies of data sets in buckets.
      eval_splits: to store evaluation logits of.
      repair: whether published shards are read, and computed again where they are damaged.
      spec: of the store.
    """

    is_demo: bool
    store: str
    data_dir: str | None
    teacher: str
    epochs: int
    views_per_shard: int
    image_cache_bytes: int
    input_buffer_bytes: int | None
    data_cache_bytes: int
    eval_splits: tuple[str, ...]
    repair: bool
    spec: Spec


def announce_demo(flags: argparse.Namespace) -> bool:
    """Whether the embedded default is asked for; if so, says it in the first line of output.

    Raises:
      UserError: only one of data set and teacher is given.
    """
    if flags.dataset is None and flags.teacher is None:
        print(
            "Embedded default: 5,000 MNIST digits (mnist_5k) and a small teacher. "
            "Your own: --dataset=NAME --data_dir=DIR --teacher=PATH --store=DIR",
            flush=True,
        )
        return True
    if flags.dataset is None or flags.teacher is None:
        missing = "--dataset" if flags.dataset is None else "--teacher"
        raise UserError(
            f"{missing} is missing: name both --dataset and --teacher, or neither for the embedded default"
        )
    if flags.store is None:
        raise UserError("--store is missing: name the directory of the store")
    return False


def resolve(flags: argparse.Namespace, *, is_demo: bool) -> PrecomputeOptions:
    """Flags to options: reads the data set's metadata, fingerprints the teacher and builds the spec.

    Raises:
      UserError: anything that cannot work; what needs no loading is refused before anything is loaded.
    """
    recipe = check_flags(flags)
    temperature = recipe.temperature if flags.temperature is None else flags.temperature
    dataset_name, data_dir, teacher = flags.dataset, flags.data_dir, flags.teacher
    if is_demo:
        dataset_name, data_dir = demo.DATASET, str(demo.prepare_dataset())
        teacher = str(demo.prepare_teacher())
    dataset = Dataset(dataset_name, flags.split, data_dir=data_dir, data_cache_bytes=flags.data_cache_bytes)
    loaded = Teacher(
        teacher,
        image_size=recipe.policy.image_size,
        num_classes=dataset.num_classes,
        value_range=flags.teacher_value_range,
        signature=flags.teacher_signature,
    )
    spec = Spec(
        dataset=dataset.identity(),
        seed=flags.seed,
        policy=recipe.policy,
        eval_crop=recipe.eval_crop,
        teacher=loaded.identity(batch_size=flags.teacher_batch_size),
        num_classes=dataset.num_classes,
        codec=flags.codec,
        temperature=temperature,
        render_probe=render_probe(),
        provenance=_provenance(data_dir=data_dir, teacher=teacher, is_demo=is_demo, recipe=flags.recipe),
    )
    return PrecomputeOptions(
        is_demo=is_demo,
        store=flags.store or DEMO_STORE,
        data_dir=data_dir,
        teacher=teacher,
        epochs=flags.epochs,
        views_per_shard=flags.views_per_shard,
        image_cache_bytes=flags.image_cache_bytes,
        input_buffer_bytes=flags.input_buffer_bytes,
        data_cache_bytes=flags.data_cache_bytes,
        eval_splits=find_eval_splits(flags.eval_splits, dataset),
        repair=flags.repair,
        spec=spec,
    )


def check_flags(flags: argparse.Namespace) -> ViewRecipe:
    """The recipe asked for, with the flags that override it.

    Raises:
      UserError: a flag is out of range, which needs nothing to be loaded or made to see.
    """
    check_codec(flags.codec)
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
    policy = dataclasses.replace(base.policy, **{k: v for k, v in given.items() if v is not None})
    return dataclasses.replace(base, policy=policy)


def find_eval_splits(text: str, dataset: Dataset) -> tuple[str, ...]:
    """Names of the splits to evaluate: `all`, `none`, or a comma-separated list that exists."""
    if text in ("all", "none"):
        return tuple(dataset.split_names) if text == "all" else ()
    names = tuple(dict.fromkeys(filter(None, text.split(","))))
    if unknown := [name for name in names if name not in dataset.split_names]:
        raise UserError(
            f"--eval_splits={text}: no split {', '.join(unknown)}; {dataset.name} has {', '.join(dataset.split_names)}"
        )
    return names


def _provenance(*, data_dir: str | None, teacher: str, is_demo: bool, recipe: str | None) -> Provenance:
    return {
        "command": f"python -m pipeline.precompute {shlex.join(sys.argv[1:])}".strip(),
        # Paths as given: they may be relative to it.
        "directory": str(Path.cwd()),
        "data_dir": data_dir,
        "teacher": teacher,
        "embedded_default": is_demo,
        "recipe": recipe,
        "versions": machine.versions(),
        "processor": machine.processor(),
    }
