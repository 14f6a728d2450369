"""Describes a run before it starts."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.store.splits import may_overlap
from pipeline.store.view_store import ViewStore
from pipeline.views.input import CHECK_EVERY
from trainer import models
from trainer.config.run_length import count_text
from trainer.run.options import TrainOptions
from trainer.run.run_schedule import Schedule
from trainer.targets.arms import OFFLINE


def describe(options: TrainOptions, store: ViewStore, *, previous: Schedule | None = None) -> str:
    """Describes a run before it starts, in one or more lines."""
    length, recipe, flags = options.length, options.recipe, options.flags
    dataset = store.spec.dataset
    line = (
        f"{recipe.student} on {dataset.name} ({dataset.split}): {count_text(length.steps)} steps of {recipe.batch_size} views, "
        f"{count_text(length.epochs)} epoch{'' if length.epochs == 1 else 's'}; {store.epochs} in the store; recipe "
        f"{options.recipe_name}"
    )
    if flags.follow and length.steps * recipe.batch_size > store.views.num_records:
        line += "; waits for epochs that are not published yet"
    lines = [line]
    if options.warmup_steps >= length.steps:
        lines.insert(
            0,
            f"warm-up ({options.warmup_steps} steps) exceeds the run ({length.steps} steps); the learning rate never reaches "
            "its peak",
        )
    if length.endless:
        lines.append(
            f"warm-up of {options.warmup_steps:,} steps, then a constant learning rate until SIGTERM"
        )
    if len(store.stores) > 1:
        parts = [
            f"{part.location} ({weight:.3g})"
            for part, weight in zip(store.stores, store.weights, strict=True)
        ]
        lines.append(f"mean of the logits, by weight, of {', '.join(parts)}")
    if own := [part.image_size for part in store.stores if part.image_size != store.image_size]:
        sizes = ", ".join(f"{size}" for size in dict.fromkeys(own))
        lines.append(
            f"crops are rendered at {store.image_size} pixels: the source image of every view is verified, and the crop at the "
            f"store's {sizes} pixels in one batch of {CHECK_EVERY}"
        )
    split = options.eval_split
    if split is not None and split not in store.held_out_splits:
        lines.append(
            f"--eval_split={split} is not held out: it shares examples with the training split {dataset.split}"
        )
    if options.arm is not OFFLINE:
        lines.append(f"arm {options.arm.name}: {options.arm.summary}")
    elif length.online_from < length.steps:
        lines.append(
            f"online teacher from step {length.online_from:,} on, with views past the end of the store"
        )
    lines += _length_notes(options, store, previous=previous)
    return "\n".join(lines)


def _length_notes(options: TrainOptions, store: ViewStore, *, previous: Schedule | None) -> list[str]:
    """Notes on a length that differs from the store's, a student that is slow at this size, and skipped views."""
    length, recipe, flags = options.length, options.recipe, options.flags
    lines: list[str] = []
    given = bool(flags.epochs or flags.steps)
    stored_steps = store.views.num_records // length.batch_size
    if previous is not None and previous.steps == length.steps and not given and stored_steps != length.steps:
        lines.append(
            f"the run keeps its length of {count_text(length.steps)} steps, although the store has views for {stored_steps:,}; "
            f"extend it with --epochs={store.epochs}"
        )
    if (notice := models.size_notice(recipe.student, store.image_size)) is not None:
        lines.append(notice)
    in_steps = flags.steps or length.endless or (previous is not None and not flags.epochs)
    epochs = None if in_steps else recipe.epochs or store.epochs
    if epochs is not None and (left := length.left_over(int(epochs))):
        views = "view does" if left == 1 else "views do"
        lines.append(
            f"the last {left:,} {views} not fill a batch and will be skipped; extending the run trains on them first"
        )
    return lines


def describe_missing_split(store: ViewStore, split_names: Sequence[str]) -> str:
    """Explains, before a run, that no accuracy will be reported, and how to get one."""
    dataset = store.spec.dataset
    if others := [name for name in split_names if not may_overlap(name, dataset.split)]:
        remedy = f"run its precompute again with --eval_splits={','.join(others)}, then this command"
    else:
        name, cut = split_names[0], dataset.num_examples * 4 // 5
        remedy = (
            f"since {dataset.name} has no other split, precompute a store with --split={name}[:{cut}] "
            f"--eval_splits={name}[{cut}:], for example"
        )
    return (
        f"no accuracy will be reported, because no teacher outputs for a held-out split are in {store.location}; to get one, "
        f"{remedy}"
    )
