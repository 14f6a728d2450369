"""Options of a precompute: resolved flags, and the requested spec."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import shlex
import sys
from pathlib import Path

from pipeline.cli import environment
from pipeline.cli.choices import DEMO_STORE
from pipeline.errors import UserError
from pipeline.flags.classes import read_class_map, read_class_names, resolve_class_map
from pipeline.flags.precompute import check_flags, view_recipe_of
from pipeline.inputs import embedded
from pipeline.inputs.dataset import Dataset
from pipeline.inputs.labels import ClassMatch, match_classes
from pipeline.inputs.teacher import Teacher
from pipeline.store.classes import Classes
from pipeline.store.layout import VIEWS_SPLIT
from pipeline.store.spec import Provenance, Spec
from pipeline.store.splits import file_split
from pipeline.views.render import render_probe

_LONGEST_SPLIT = 100  # characters, in file names


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrecomputeOptions:
    """Resolved options of a precompute.

    Attributes:
      is_demo: whether the embedded default is used.
      store: path or URL of the store.
      data_dir: path or URL of the TFDS data directory.
      teacher: path or URL of the teacher.
      epochs: total number of epochs in the store.
      views_per_shard: largest number of views per shard.
      image_cache_bytes: memory for decoded images, per process.
      input_buffer_bytes: memory for batches that are rendered ahead, per process; None for a quarter of the memory.
      data_cache_bytes: disk space for copies of data sets from buckets.
      datasets: data set of each split of the store: `views` and the evaluated splits.
      repair: whether damaged published shards are computed again.
      assume_value_range: whether the value range is accepted whatever the teacher's top-1.
      spec: requested spec.
      classes: classes and labels of the store.
      match: how the teacher's classes match the labels.
      loaded: the loaded teacher.
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
    datasets: dict[str, Dataset]
    repair: bool
    assume_value_range: bool
    spec: Spec
    classes: Classes
    match: ClassMatch
    loaded: Teacher

    @property
    def eval_splits(self) -> tuple[str, ...]:
        """Names of the evaluated splits."""
        return tuple(split for split in self.datasets if split != VIEWS_SPLIT)


@dataclasses.dataclass(frozen=True)
class _Inputs:
    """Where data set and teacher are."""

    dataset: str
    data_dir: str | None
    teacher: str

    def open_dataset(self, flags: argparse.Namespace, label_feature: str | None) -> Dataset:
        return Dataset(
            self.dataset,
            flags.split,
            data_dir=self.data_dir,
            data_cache_bytes=flags.data_cache_bytes,
            image_feature=flags.image_feature,
            label_feature=label_feature,
        )

    def load_teacher(self, flags: argparse.Namespace, *, image_size: int) -> Teacher:
        return Teacher(
            self.teacher,
            image_size=image_size,
            value_range=flags.teacher_value_range,
            signature=flags.teacher_signature,
            output=flags.teacher_output,
            batch_size=flags.teacher_batch_size,
        )


def resolve(
    flags: argparse.Namespace, *, is_demo: bool, recorded: Classes | None = None
) -> PrecomputeOptions:
    """Resolves flags: reads the data set's metadata, loads and fingerprints the teacher, and builds the spec.

    Args:
      flags: flags of the precompute.
      is_demo: whether the embedded default is used.
      recorded: what the store has recorded of classes and labels; the flags for them replace all of it.

    Raises:
      UserError: a flag is out of range, or the data set or the teacher cannot be used. Flags are checked before anything is
        loaded.
    """
    check_flags(flags)
    recipe = view_recipe_of(flags)
    place = _Inputs(flags.dataset, flags.data_dir, flags.teacher)
    if is_demo:
        place = _Inputs(embedded.DATASET, str(embedded.prepare_dataset()), str(embedded.prepare_teacher()))
    recorded = recorded or Classes()
    label_feature = flags.label_feature if _gives_classes(flags) else recorded.label_feature
    dataset = place.open_dataset(flags, label_feature)
    loaded = place.load_teacher(flags, image_size=recipe.policy.image_size)
    spec = Spec(
        dataset=dataset.identity(),
        seed=flags.seed,
        policy=recipe.policy,
        eval_crop=recipe.eval_crop,
        teacher=loaded.identity(batch_size=flags.teacher_batch_size),
        num_classes=loaded.num_classes,
        codec=flags.codec,
        temperature=recipe.temperature if flags.temperature is None else flags.temperature,
        render_probe=render_probe(),
        provenance=_provenance(flags, data_dir=place.data_dir, teacher=place.teacher, is_demo=is_demo),
    )
    classes = _classes(flags, dataset, loaded.num_classes, recorded=recorded)
    return PrecomputeOptions(
        is_demo=is_demo,
        store=flags.store or DEMO_STORE,
        data_dir=place.data_dir,
        teacher=place.teacher,
        epochs=flags.epochs,
        views_per_shard=flags.views_per_shard,
        image_cache_bytes=flags.image_cache_bytes,
        input_buffer_bytes=flags.input_buffer_bytes,
        data_cache_bytes=flags.data_cache_bytes,
        datasets={VIEWS_SPLIT: dataset, **find_eval_splits(flags.eval_splits, dataset)},
        repair=flags.repair,
        assume_value_range=flags.assume_value_range,
        spec=spec,
        classes=classes,
        match=match_classes(dataset, loaded.num_classes, classes),
        loaded=loaded,
    )


def _gives_classes(flags: argparse.Namespace) -> bool:
    return any((flags.label_feature, flags.class_names, flags.class_map))


def _classes(flags: argparse.Namespace, dataset: Dataset, num_classes: int, *, recorded: Classes) -> Classes:
    """Classes and labels of the flags, or those that are recorded.

    Raises:
      UserError: a file of classes does not fit the teacher or the data set.
    """
    if not _gives_classes(flags):
        # A misfit is that of a store with another spec, which is refused later.
        return recorded if recorded.misfit(num_classes) is None else Classes()
    names = class_map = None
    if flags.class_names is not None:
        names = read_class_names(flags.class_names)
        if len(names) != num_classes:
            raise UserError(
                f"--class_names={flags.class_names}: has {len(names):,} names, expected {num_classes:,}, one per class of the teacher"
            )
    if flags.class_map is not None:
        if not dataset.num_classes:
            raise UserError(
                f"--class_map={flags.class_map}: has no effect, since {dataset.name} has no labels; leave it out"
            )
        class_map = resolve_class_map(
            flags.class_map,
            read_class_map(flags.class_map),
            num_classes=num_classes,
            class_names=names,
            labels=dataset.class_names,
        )
    return Classes(label_feature=flags.label_feature, names=names, class_map=class_map)


def find_eval_splits(text: str, dataset: Dataset) -> dict[str, Dataset]:
    """Opens the evaluated splits.

    Args:
      text: `none`, or a comma-separated list of splits, slices and `all`, which means every split.
      dataset: any split of the data set.

    Returns:
      Data sets by split name.

    Raises:
      UserError: there is no such split, or its file name in a store is too long or taken.
    """
    requested = [name.strip() for name in text.split(",")] if text != "none" else []
    groups = (dataset.split_names if name == "all" else [name] for name in requested if name)
    names = list(dict.fromkeys(itertools.chain.from_iterable(groups)))
    found = {name: dataset.select(name, parameter="eval_splits") for name in names}
    # File name to split. Whole splits take precedence over slices.
    taken = {file_split(name): name for name in [*dataset.split_names, *names][::-1]}
    for name in names:
        other = taken[file_split(name)]
        if other != name or name == VIEWS_SPLIT or len(file_split(name)) > _LONGEST_SPLIT:
            raise UserError(
                f"`eval_splits`={name}: its file name in a store, {file_split(name):.120}, is longer than {_LONGEST_SPLIT} "
                f"characters or taken by {VIEWS_SPLIT if name == VIEWS_SPLIT else other}; name another slice, or rename the split"
            )
    return found


def _provenance(
    flags: argparse.Namespace, *, data_dir: str | None, teacher: str, is_demo: bool
) -> Provenance:
    out: Provenance = {
        "command": f"python -m pipeline.precompute {shlex.join(sys.argv[1:])}".strip(),
        # Relative paths are relative to this directory.
        "directory": str(Path.cwd()),
        "data_dir": data_dir,
        "teacher": teacher,
        "embedded_default": is_demo,
        "recipe": flags.recipe,
        "versions": environment.versions(),
        "processor": environment.processor(),
    }
    return {**out, "assume_logits": True} if flags.assume_logits else out
