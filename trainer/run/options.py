"""The options of a training run: its flags resolved against the store."""

from __future__ import annotations

import argparse
import dataclasses
import math
from typing import Any

from pipeline.cli.choices import check_num_classes
from pipeline.cli.units import counted
from pipeline.errors import UserError
from pipeline.storage.bucket import is_url
from pipeline.storage.cache import DATA_CACHE_BYTES
from pipeline.store.reader import Store
from pipeline.store.spec import Spec, differences
from pipeline.views.recipes import view_recipe
from trainer.config.choices import check_student
from trainer.config.recipes import TrainRecipe, train_recipe
from trainer.config.run_length import MAX_VIEWS, RunLength, count_text
from trainer.flags.train import ENDLESS_EVAL_EVERY, ENDLESS_WARMUP_STEPS, EVAL_BATCH_SIZE, check_combinations
from trainer.run.begun import Schedule
from trainer.targets.arms import ARMS, OFFLINE, Arm

# Flags that may differ between the workers of a run: each machine has its own paths and memory.
_OF_A_MACHINE = {
    *("store", "data_dir", "workdir", "teacher"),
    *("data_cache_bytes", "shard_cache_bytes", "image_cache_bytes", "input_buffer_bytes", "eval_batch_size"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What was asked of a run, resolved.

    Attributes:
      flags: as given.
      recipe_name, recipe: with the flags that override it.
      temperature: T of the loss.
      length: of the run.
      warmup_steps: of the schedule.
      eval_split: for intervals, or None where the store has no evaluation logits.
      eval_every: steps of an interval.
    """

    flags: dict[str, Any]
    recipe_name: str
    recipe: TrainRecipe
    temperature: float
    length: RunLength
    warmup_steps: int
    eval_split: str | None
    eval_every: int

    @property
    def schedule(self) -> Schedule:
        """Of the learning rate."""
        return Schedule(
            steps=self.length.steps, batch_size=self.length.batch_size, warmup_steps=self.warmup_steps
        )

    @property
    def arm(self) -> Arm:
        """What the run is trained on."""
        return ARMS[self.flags["arm"]]

    def check_teacher(self) -> None:
        """Refuses `--teacher` for a new run that does not need it.

        One that has begun may have needed it: the same command goes on, though the store has grown meanwhile.

        Raises:
          UserError: every view of the run is stored, with its logits.
        """
        teacher = self.flags["teacher"]
        if teacher is not None and not self.arm.live and self.length.online_from == self.length.steps:
            raise UserError(
                f"--teacher={teacher}: has no effect: the store holds all {count_text(self.length.steps)} steps of this run, "
                "with their logits; leave it out, or train longer"
            )

    def to_json(self) -> dict[str, Any]:
        """The text of config.json: everything that was asked. JSON has no infinity: `inf`, as on the command line."""
        out: dict[str, Any] = _spell_infinity(dataclasses.asdict(self))
        return out

    def identity(self, spec_digest: str) -> dict[str, Any]:
        """What has to be the same for a run to be continued from its checkpoint.

        Length and schedule are left out: a finished run may be extended.
        """
        recipe = {
            k: v
            for k, v in self.recipe.to_json().items()
            if k not in ("source", "warmup_steps", "views", "epochs", "allow_short_run")
        }
        out = {
            "spec": spec_digest,
            "recipe_name": self.recipe_name,
            **recipe,
            "temperature": self.temperature,
            "seed": self.flags["seed"],
            "precision": self.flags["precision"],
        }
        # Only where they are not the default: earlier checkpoints do not have them.
        if self.arm is not OFFLINE:
            out["arm"] = self.arm.name
        if self.flags["sync_batch_norm"]:
            out["sync_batch_norm"] = True
        return out

    def shared(self, spec_digest: str) -> dict[str, Any]:
        """What all workers of a run must have in common: every flag but paths and memory, and what it came to."""
        flags = {name: value for name, value in self.to_json()["flags"].items() if name not in _OF_A_MACHINE}
        return {
            **flags,
            **self.identity(spec_digest),
            "steps": self.length.steps,
            "warmup_steps": self.warmup_steps,
            "eval_every": self.eval_every,
            "eval_split": self.eval_split,
        }


def _spell_infinity(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {name: _spell_infinity(branch) for name, branch in tree.items()}
    return "inf" if tree == math.inf else tree


def resolve(flags: argparse.Namespace, store: Store, *, begun: Schedule | None = None) -> TrainOptions:
    """Flags and a store to options.

    Args:
      flags: as given.
      store: to train on.
      begun: the schedule of the run that the work directory holds, which keeps its length unless flags ask for another.

    Raises:
      UserError: anything that cannot work, or that is surely a mistake, before anything is loaded.
    """
    check_combinations(flags)
    spec = store.spec
    check_num_classes(spec.num_classes, of=f"--store={store.location}")
    name = flags.recipe or default_recipe(spec)
    recipe = train_recipe(name)
    if not flags.allow_recipe_mismatch:
        check_views(name, spec)
    given = {f.name: getattr(flags, f.name, None) for f in dataclasses.fields(TrainRecipe)}
    recipe = dataclasses.replace(recipe, **{k: v for k, v in given.items() if v is not None})
    check_student(recipe.student)
    if flags.follow:
        _check_follow(flags, recipe, store)
    steps = flags.steps
    epochs = None if steps else recipe.epochs or store.epochs
    # With another batch size, the run is refused by its checkpoint.
    keeps = begun is not None and begun.batch_size == recipe.batch_size
    if begun is not None and keeps and flags.epochs is None and steps is None:
        epochs, steps = (math.inf, None) if begun.steps == math.inf else (None, int(begun.steps))
    length = RunLength.of(
        epochs=epochs,
        steps=steps,
        batch_size=recipe.batch_size,
        num_examples=spec.num_examples,
        stored_views=MAX_VIEWS if flags.follow else store.views.num_records,
    )
    temperature = spec.temperature if recipe.temperature is None else recipe.temperature
    if spec.make_codec().only_temperature not in (None, temperature):
        raise UserError(
            f"--temperature={temperature:g}: the store's codec {spec.codec} keeps the softmax of --temperature={spec.temperature:g} "
            "alone; train at that, or precompute with another codec or temperature"
        )
    arm = ARMS[flags.arm]
    if arm is not OFFLINE:
        length = _compared(arm, length, flags, store)
    if flags.teacher is None and not arm.live:
        _check_stored(length, store)
    eval_split = _eval_split(flags.eval_split, store)
    _check_effects(flags, store, eval_split=eval_split)
    default = ENDLESS_WARMUP_STEPS if length.endless else int(length.steps // 20)
    warmup_steps = default if recipe.warmup_steps is None else recipe.warmup_steps
    if warmup_steps >= length.steps and not recipe.allow_short_run:
        raise UserError(
            f"--warmup_steps={warmup_steps}: the run has {length.steps} steps and would never leave its warm-up; "
            "train longer, warm up shorter, or pass --allow_short_run"
        )
    return TrainOptions(
        flags=dict(vars(flags)),
        recipe_name=name,
        recipe=recipe,
        temperature=temperature,
        length=length,
        warmup_steps=warmup_steps,
        eval_split=eval_split,
        eval_every=flags.eval_every or _eval_every(length),
    )


def _check_effects(flags: argparse.Namespace, store: Store, *, eval_split: str | None) -> None:
    """Refuses flags that have no effect with this store.

    Raises:
      UserError: names the flag and what is missing.
    """
    data_dir = flags.data_dir or store.spec.provenance.get("data_dir")
    if flags.data_cache_bytes != DATA_CACHE_BYTES and not is_url(str(data_dir)):
        raise UserError(
            f"--data_cache_bytes={flags.data_cache_bytes}: has no effect without a data set in a bucket; it is in {data_dir}"
        )
    if flags.eval_batch_size != EVAL_BATCH_SIZE and eval_split is None and not store.held_out_splits:
        raise UserError(
            f"--eval_batch_size={flags.eval_batch_size}: has no effect without evaluation logits of a held-out split, which "
            f"{store.location} does not have; leave it out"
        )


def default_recipe(spec: Spec) -> str:
    """Name of the recipe for a store when none is asked for."""
    return "demo" if spec.provenance.get("embedded_default") else "default"


def check_views(name: str, spec: Spec) -> None:
    """Refuses a store whose views are not the recipe's.

    Raises:
      UserError: lists what differs, with both sides.
    """
    wanted = train_recipe(name).views
    if wanted is None:
        return
    half = view_recipe(wanted)
    lines = differences(
        {"policy": half.policy.to_json(), "eval_crop": half.eval_crop.to_json()},
        {"policy": spec.policy.to_json(), "eval_crop": spec.eval_crop.to_json()},
        sides=("in the recipe", "in the store"),
    )
    if lines:
        raise UserError(
            f"--recipe={name}: the store's views are not the recipe's: {'; '.join(lines)}; precompute with "
            f"--recipe={wanted}, or pass --allow_recipe_mismatch"
        )


def _check_follow(flags: argparse.Namespace, recipe: TrainRecipe, store: Store) -> None:
    """Refuses `--follow` where the run's length is not known, or where its views are not the store's.

    Raises:
      UserError: names the flag that is missing, or the other one.
    """
    if flags.steps is None and recipe.epochs in (None, math.inf):
        given = "--epochs=inf" if recipe.epochs else "neither --epochs nor --steps"
        raise UserError(
            f"--follow: with {given}; the store grows, it holds {counted(store.epochs, 'epoch')} now, and the schedule of the learning "
            "rate needs the length of the run: pass the precompute's --epochs"
        )


def _check_stored(length: RunLength, store: Store) -> None:
    """Refuses a run without a teacher that is longer than the store.

    Raises:
      UserError: says what is missing.
    """
    teacher = f"--teacher={store.spec.provenance.get('teacher', 'PATH')}"
    if length.endless:
        raise UserError(
            f"--epochs=inf needs --teacher: the store holds {counted(store.epochs, 'epoch')}, and a run without an end goes on "
            f"online; pass {teacher}, or train for --epochs={store.epochs}"
        )
    if length.online_from < length.steps:
        raise UserError(
            f"{length.steps:,} steps of {length.batch_size} need {length.steps * length.batch_size:,} views, the store "
            f"holds {store.views.num_records:,} ({counted(store.epochs, 'epoch')}); pass {teacher} to go on online, precompute "
            f"more epochs, or train for --epochs={store.epochs}"
        )


def _compared(arm: Arm, length: RunLength, flags: argparse.Namespace, store: Store) -> RunLength:
    """The length of a run of an arm that is compared with `offline`: on stored views, like that one.

    Raises:
      UserError: the store has not what the arm needs.
    """
    if flags.write_back:
        raise UserError(
            f"--arm={arm.name}: with --write_back; all its views are stored: leave one of them out"
        )
    if length.online_from < length.steps:
        raise UserError(
            f"--arm={arm.name}: {count_text(length.steps)} steps of {length.batch_size} need "
            f"{count_text(length.steps * length.batch_size)} views, the store holds {store.views.num_records:,}, and what is "
            f"compared is trained on stored views; precompute more epochs, or train for --epochs={store.epochs}"
        )
    arm.check(store)
    return dataclasses.replace(length, online_from=0) if arm.live else length


def _eval_every(length: RunLength) -> int:
    return ENDLESS_EVAL_EVERY if length.endless else -(-int(length.steps) // 10)


def _eval_split(asked: str | None, store: Store) -> str | None:
    """The split to evaluate on: as asked, else validation, test or another one that is held out, else none."""
    if asked is not None:
        store.eval_reader(asked)
        return asked
    held_out = store.held_out_splits
    return next((name for name in ("validation", "test", *held_out) if name in held_out), None)
