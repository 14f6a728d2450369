"""What a run says of itself before it begins."""

from __future__ import annotations

import math

from pipeline.store.reader import Store
from trainer.options import TrainOptions


def count_text(number: float) -> str:
    """A count for a reader: `endlessly many` without an end, no fraction where there is none."""
    if number == math.inf:
        return "endlessly many"
    return f"{number:,}" if isinstance(number, int) else f"{number:,.1f}"


def describe(options: TrainOptions, store: Store) -> str:
    """The lines before a run."""
    length, recipe = options.length, options.recipe
    dataset = store.spec.dataset
    text = (
        f"{recipe.student} on {dataset['name']} ({dataset['split']}): {count_text(length.steps)} steps of "
        f"{recipe.batch_size} views, {count_text(length.epochs)} epochs; store holds {store.epochs}; recipe "
        f"{options.recipe_name}"
    )
    if length.endless:
        text += f"\nwarm-up of {options.warmup_steps:,} steps, then a constant rate until SIGTERM"
    if length.online_from < length.steps:
        text += f"\nonline teacher from step {length.online_from:,} on, with the continuing views"
    if options.warmup_steps >= length.steps:
        text = f"warm-up of {options.warmup_steps} steps is longer than this run of {length.steps}: the rate never gets to its peak\n{text}"
    epochs = None if options.flags["steps"] or length.endless else recipe.epochs or store.epochs
    if epochs is not None and (left := length.left_over(int(epochs))):
        text += f"\n{left} views of the last epoch fill no batch; they come first if the run is extended"
    return text
