"""Options of a training run: flags resolved against the store and the recipe."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

from pipeline.cli.choices import check_num_classes
from pipeline.cli.units import counted
from pipeline.errors import UserError
from pipeline.inputs.teacher import fingerprint
from pipeline.storage.bucket import is_url
from pipeline.storage.cache import DATA_CACHE_BYTES
from pipeline.storage.files import sha256_of
from pipeline.store.spec import Spec, differences
from pipeline.store.view_store import ViewStore
from pipeline.views.recipes import view_recipe
from trainer.config.choices import student_kind
from trainer.config.recipes import TrainRecipe, train_recipe
from trainer.config.run_length import MAX_VIEWS, RunLength, check_warmup, count_text
from trainer.flags.shared import (
    ENDLESS_EVAL_EVERY,
    ENDLESS_WARMUP_STEPS,
    EVAL_BATCH_SIZE,
    spelled,
)
from trainer.flags.train import TrainFlags, check_combinations
from trainer.run.run_schedule import Schedule
from trainer.targets.arms import ARMS, OFFLINE, Arm

# Flags that may differ between the workers of a run: paths, and limits of memory and disks.
_PER_MACHINE = {
    *("store", "data_dir", "workdir", "teacher", "student", "init"),
    *("data_cache_bytes", "shard_cache_bytes", "image_cache_bytes", "input_buffer_bytes", "eval_batch_size"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Resolved options of a run.

    Attributes:
      recipe: recipe with the flags that override it.
      temperature: temperature T of the loss.
      eval_split: split for evaluations during training; None if the store has no teacher outputs for one.
    """

    flags: TrainFlags
    recipe_name: str
    recipe: TrainRecipe
    temperature: float
    length: RunLength
    warmup_steps: int
    eval_split: str | None
    eval_every: int

    @property
    def schedule(self) -> Schedule:
        """Learning-rate schedule."""
        return Schedule(
            steps=self.length.steps, batch_size=self.length.batch_size, warmup_steps=self.warmup_steps
        )

    @property
    def arm(self) -> Arm:
        """Source of the targets."""
        return ARMS[self.flags.arm]

    @functools.cached_property
    def fingerprints(self) -> dict[str, str]:
        """SHA-256 of what initial weights come from: a `student` that is a path, and `init`.

        A file counts without its name, so that it may be moved.
        """
        paths = {"init": self.flags.init}
        if student_kind(self.recipe.student) == "path":
            paths["student"] = self.recipe.student
        return {
            name: sha256_of(Path(path)) if Path(path).is_file() else fingerprint(path)
            for name, path in paths.items()
            if path is not None
        }

    def check_teacher(self) -> None:
        """Refuses `--teacher` for a new run that does not need it.

        A continued run may have needed it before the store grew, and its command stays the same.
        """
        teacher = spelled("teacher", self.flags.teacher)
        if teacher and not self.arm.live and self.length.online_from == self.length.steps:
            raise UserError(
                f"{teacher}: has no effect; the store has the logits of all {count_text(self.length.steps)} steps of "
                "this run: omit it, or train longer"
            )

    def to_json(self) -> dict[str, Any]:
        """Content of config.json. Infinity, which JSON does not have, is written as `inf`, as on the command line."""
        out: dict[str, Any] = _spell_infinity(dataclasses.asdict(self))
        for name in ("store", "teacher"):  # a single one as text
            if len(out["flags"][name] or []) == 1:
                (out["flags"][name],) = out["flags"][name]
        return out

    def identity(self, targets: dict[str, Any]) -> dict[str, Any]:
        """Values that must be the same for a run to continue from a checkpoint.

        Length and schedule are excluded, because a finished run may be extended.

        Args:
          targets: identity of what is replayed, see `ViewStore.identity`.
        """
        excluded = ("source", "warmup_steps", "views", "epochs", "allow_short_run")
        out = {
            **targets,
            "recipe_name": self.recipe_name,
            **{name: value for name, value in self.recipe.to_json().items() if name not in excluded},
            "temperature": self.temperature,
            "seed": self.flags.seed,
            "precision": self.flags.precision,
            **{name: f"sha256 {digest}" for name, digest in self.fingerprints.items()},
        }
        # Only where they are not the default: checkpoints of earlier versions do not have them.
        if self.arm is not OFFLINE:
            out["arm"] = self.arm.name
        if self.flags.sync_batch_norm:
            out["sync_batch_norm"] = True
        return out

    def shared(self, targets: dict[str, Any]) -> dict[str, Any]:
        """Values that must be the same for all workers of a run; `targets` as in `identity`."""
        flags = {name: value for name, value in self.to_json()["flags"].items() if name not in _PER_MACHINE}
        return {
            **flags,
            **self.identity(targets),
            "steps": _spell_infinity(self.length.steps),
            "warmup_steps": self.warmup_steps,
            "eval_every": self.eval_every,
            "eval_split": self.eval_split,
        }


def _spell_infinity(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {name: _spell_infinity(branch) for name, branch in tree.items()}
    return "inf" if tree == math.inf else tree


def resolve(flags: argparse.Namespace, store: ViewStore, *, previous: Schedule | None = None) -> TrainOptions:
    """Resolves flags against a store.

    Args:
      previous: schedule of the run in the work directory, whose length stays unless flags change it; None for a new run.

    Raises:
      UserError: the flags cannot work with this store, or are surely a mistake.
    """
    check_combinations(flags)
    spec = store.spec
    check_num_classes(spec.num_classes, of=f"--store={store.location}")
    name = flags.recipe or default_recipe(spec)
    recipe = train_recipe(name)
    if not flags.allow_recipe_mismatch:
        for part in store.stores:
            check_views(name, part.spec, image_size=flags.image_size)
    given = {field.name: getattr(flags, field.name, None) for field in dataclasses.fields(TrainRecipe)}
    recipe = dataclasses.replace(recipe, **{k: v for k, v in given.items() if v is not None})
    student_kind(recipe.student)  # refuses an unknown one
    length = _length(flags, recipe, store, previous=previous)
    temperature = spec.temperature if recipe.temperature is None else recipe.temperature
    check_temperature(temperature, store)
    arm = ARMS[flags.arm]
    if arm is not OFFLINE:
        length = _arm_length(arm, length, flags, store)
    if flags.teacher is None and not arm.live:
        _check_stored(length, store)
    eval_split = _eval_split(flags.eval_split, store)
    _check_effects(flags, store, eval_split=eval_split)
    return TrainOptions(
        # By name: commands that take a trainer's flags have some of their own.
        flags=TrainFlags(
            **{field.name: getattr(flags, field.name) for field in dataclasses.fields(TrainFlags)}
        ),
        recipe_name=name,
        recipe=recipe,
        temperature=temperature,
        length=length,
        warmup_steps=_warmup_steps(recipe, length),
        eval_split=eval_split,
        eval_every=flags.eval_every or _eval_every(length),
    )


def _length(
    flags: argparse.Namespace, recipe: TrainRecipe, store: ViewStore, *, previous: Schedule | None
) -> RunLength:
    if flags.follow:
        _check_follow(flags, recipe, store)
    steps = flags.steps
    epochs = None if steps else recipe.epochs or store.epochs
    # A run with another batch size is refused by its checkpoint.
    if previous is not None and previous.batch_size == recipe.batch_size and not (flags.epochs or steps):
        epochs, steps = (math.inf, None) if previous.steps == math.inf else (None, int(previous.steps))
    return RunLength.of(
        epochs=epochs,
        steps=steps,
        batch_size=recipe.batch_size,
        num_examples=store.spec.num_examples,
        stored_views=MAX_VIEWS if flags.follow else store.views.num_records,
    )


def _warmup_steps(recipe: TrainRecipe, length: RunLength) -> int:
    if recipe.warmup_steps is not None:
        steps = recipe.warmup_steps
    else:
        steps = ENDLESS_WARMUP_STEPS if length.endless else int(length.steps // 20)
    check_warmup(steps, steps=length.steps, allow_short_run=recipe.allow_short_run)
    return steps


def _check_effects(flags: argparse.Namespace, store: ViewStore, *, eval_split: str | None) -> None:
    """Refuses flags that have no effect with this store."""
    data_dir = flags.data_dir or store.spec.provenance.get("data_dir")
    if flags.data_cache_bytes != DATA_CACHE_BYTES and not is_url(str(data_dir)):
        raise UserError(
            f"--data_cache_bytes={flags.data_cache_bytes}: has no effect, since the data set is in {data_dir}, not in a bucket; "
            "omit it"
        )
    if flags.eval_batch_size != EVAL_BATCH_SIZE and eval_split is None and not store.held_out_splits:
        raise UserError(
            f"--eval_batch_size={flags.eval_batch_size}: has no effect, since no teacher outputs for a held-out split are in "
            f"{store.location}; omit it"
        )


def default_recipe(spec: Spec) -> str:
    """Name of the default recipe for a store."""
    return "demo" if spec.provenance.get("embedded_default") else "default"


def check_temperature(temperature: float, store: ViewStore) -> None:
    """Refuses a temperature of the loss that a store's codec does not support.

    Raises:
      UserError: the codec keeps the logits for another temperature.
    """
    for part in store.stores:
        if part.spec.make_codec().only_temperature not in (None, temperature):
            raise UserError(
                f"--temperature={temperature:g}: the codec {part.spec.codec} of {part.location} supports only "
                f"--temperature={part.spec.temperature:g}; use that, or precompute with another codec or temperature"
            )


def check_views(name: str, spec: Spec, *, image_size: int | None = None) -> None:
    """Refuses a store whose views are not the recipe's; `image_size` of the flags overrides the recipe's."""
    wanted = train_recipe(name).views
    if wanted is None:
        return
    views = view_recipe(wanted)
    policy = spec.policy
    if image_size is not None and policy.any_size:
        policy = dataclasses.replace(policy, image_size=views.policy.image_size)
    lines = differences(
        {"policy": views.policy.to_json(), "eval_crop": views.eval_crop.to_json()},
        {"policy": policy.to_json(), "eval_crop": spec.eval_crop.to_json()},
        sides=("in the recipe", "in the store"),
    )
    if lines:
        raise UserError(
            f"--recipe={name}: the views of the store are not the recipe's: {'; '.join(lines)}; precompute with "
            f"--recipe={wanted}, or pass --allow_recipe_mismatch"
        )


def _check_follow(flags: argparse.Namespace, recipe: TrainRecipe, store: ViewStore) -> None:
    """Refuses `--follow` without a length: the store grows, and the schedule needs the final number of steps."""
    if flags.steps is None and recipe.epochs in (None, math.inf):
        given = "--epochs=inf" if recipe.epochs else "neither --epochs nor --steps"
        raise UserError(
            f"--follow: got {given}, but the learning-rate schedule needs the length of the run, and the store, with "
            f"{counted(store.epochs, 'epoch')} so far, is growing; pass the --epochs of the precompute"
        )


def _check_stored(length: RunLength, store: ViewStore) -> None:
    """Refuses a run without a teacher that is longer than the store."""
    teacher = spelled("teacher", [str(part.spec.provenance.get("teacher", "PATH")) for part in store.stores])
    stored = counted(store.epochs, "epoch")
    if length.endless:
        raise UserError(
            f"--epochs=inf: needs --teacher, since the store has only {stored}; pass {teacher} to continue online, or train for "
            f"--epochs={store.epochs}"
        )
    if length.online_from < length.steps:
        raise UserError(
            f"{length.steps:,} steps of {length.batch_size} need {length.steps * length.batch_size:,} views, but the store has "
            f"only {store.views.num_records:,} ({stored}); pass {teacher} to continue online, precompute more epochs, or "
            f"train for --epochs={store.epochs}"
        )


def _arm_length(arm: Arm, length: RunLength, flags: argparse.Namespace, store: ViewStore) -> RunLength:
    """The length of a run of an arm other than `offline`, which trains on stored views only."""
    if flags.write_back:
        raise UserError(
            f"--arm={arm.name}: has all its views in the store, so that --write_back has nothing to append; omit one of them"
        )
    if length.online_from < length.steps:
        raise UserError(
            f"--arm={arm.name}: trains on stored views only, but {count_text(length.steps)} steps of {length.batch_size} need "
            f"{count_text(length.steps * length.batch_size)} views, and the store has {store.views.num_records:,}; precompute more "
            f"epochs, or train for --epochs={store.epochs}"
        )
    arm.check(store)
    return dataclasses.replace(length, online_from=0) if arm.live else length


def _eval_every(length: RunLength) -> int:
    return ENDLESS_EVAL_EVERY if length.endless else -(-int(length.steps) // 10)


def _eval_split(asked: str | None, store: ViewStore) -> str | None:
    """The split to evaluate on: the one asked for, or validation, test, or another held-out split; None if there is none."""
    if asked is not None:
        store.eval_reader(asked)
        return asked
    held_out = store.held_out_splits
    return next((name for name in ("validation", "test", *held_out) if name in held_out), None)
