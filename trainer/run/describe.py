"""The lines that describe a run before it starts."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.store.reader import Store
from pipeline.store.splits import may_overlap
from trainer import models
from trainer.config.run_length import count_text
from trainer.run.begun import Schedule
from trainer.run.options import TrainOptions
from trainer.targets.arms import OFFLINE


def describe(options: TrainOptions, store: Store, *, begun: Schedule | None = None) -> str:
    """The lines before a run; `begun` is the schedule of the run that the work directory holds."""
    length, recipe = options.length, options.recipe
    dataset = store.spec.dataset
    text = (
        f"{recipe.student} on {dataset.name} ({dataset.split}): {count_text(length.steps)} steps of "
        f"{recipe.batch_size} views, {count_text(length.epochs)} epoch{'' if length.epochs == 1 else 's'}; store holds {store.epochs}; recipe "
        f"{options.recipe_name}"
    )
    if options.flags["follow"] and length.steps * recipe.batch_size > store.views.num_records:
        text += "; waits for epochs that are not published yet"
    if length.endless:
        text += f"\nwarm-up of {options.warmup_steps:,} steps, then a constant rate until SIGTERM"
    split = options.eval_split
    if split is not None and split not in store.held_out_splits:
        text += f"\n--eval_split={split} is not held out: it shares examples with the training split {dataset.split}"
    if options.arm is not OFFLINE:
        text += f"\narm {options.arm.name}: {options.arm.summary}"
    elif length.online_from < length.steps:
        text += f"\nonline teacher from step {length.online_from:,} on, with the continuing views"
    if begun is not None and begun.steps == length.steps:
        holds = store.views.num_records // length.batch_size
        if not (options.flags["epochs"] or options.flags["steps"]) and holds != length.steps:
            text += (
                f"\nthe run keeps its length of {count_text(length.steps)} steps, although the store has views for {holds:,}; "
                f"--epochs={store.epochs} changes it"
            )
    if (notice := models.size_notice(recipe.student, store.spec.policy.image_size)) is not None:
        text += f"\n{notice}"
    if options.warmup_steps >= length.steps:
        text = f"warm-up of {options.warmup_steps} steps is longer than this run of {length.steps}: the rate never gets to its peak\n{text}"
    kept = begun is not None and not options.flags["epochs"]  # a length in steps
    epochs = None if kept or options.flags["steps"] or length.endless else recipe.epochs or store.epochs
    if epochs is not None and (left := length.left_over(int(epochs))):
        text += f"\n{left} views of the last epoch fill no batch; they come first if the run is extended"
    return text


def describe_missing_split(store: Store, split_names: Sequence[str]) -> str:
    """The line before a run that no figure will end: the store has no evaluation logits of a held-out split.

    Args:
      store: to train on.
      split_names: of its data set.
    """
    dataset = store.spec.dataset
    if others := [name for name in split_names if not may_overlap(name, dataset.split)]:
        remedy = f"run its precompute again with --eval_splits={','.join(others)}, then this command"
    else:
        name, cut = split_names[0], dataset.num_examples * 4 // 5
        remedy = (
            f"{dataset.name} has no other split: precompute a store with --split={name}[:{cut}] "
            f"--eval_splits={name}[{cut}:], for example"
        )
    return f"no accuracy will be reported: {store.location} has no evaluation logits of a held-out split; to have one, {remedy}"
