"""Why a run failed: the view, example or logit behind what TensorFlow or a figure says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pipeline.errors import DataError
from pipeline.errors.causes import find_reason
from pipeline.inputs.device_memory import out_of_memory
from trainer.targets.online_teacher import find_unfit_logits

if TYPE_CHECKING:
    from trainer.run.training import Run

_PREFETCHED = 64  # batches that may have been under way when one of them failed


def from_the_input(error: Exception) -> bool:
    """Whether the input pipeline raised an error of TensorFlow's, rather than the step."""
    return "{{node IteratorGetNext}}" in str(error)


def memory_remedy(run: Run) -> str:
    """What to do when a step of the run does not fit into memory."""
    flags = run.options.flags
    remedy = f"lower --batch_size ({run.options.recipe.batch_size} views per step)"
    if (steps := flags["steps_per_execution"]) > 1:
        remedy += f" or --steps_per_execution ({steps})"
    if run.online_teacher is not None:
        remedy += (
            f"; the online teacher takes {run.online_teacher.batch_size} views at a time, as the store's "
            "--teacher_batch_size says: training on stored views alone needs no teacher"
        )
    return remedy


def explain(run: Run, error: Exception, step: int) -> Exception:
    """The error of ours behind TensorFlow's, looked for among the batches that were under way after `step` steps."""
    if (found := find_reason(error)) is not None:
        return found
    if not from_the_input(error) and (found := out_of_memory(error, memory_remedy(run))) is not None:
        return found
    batch, size = run.options.recipe.batch_size, run.targets.input.batch_size
    under_way = run.options.flags["steps_per_execution"] + _PREFETCHED
    stop = int(min(step + under_way, run.options.length.steps))
    for start in range(step * batch, stop * batch, size):
        try:
            next(run.targets.input.batches(np.array([start])))
        except DataError as cause:
            return cause
    return error


def explain_divergence(run: Run, first: int, last: int) -> DataError | None:
    """The logit that made the loss of a step in `first .. last - 1` infinite, if the teacher did."""
    options, length = run.options, run.options.length
    # All figures were finite at the last step that was logged, and that one was the last of an execution.
    logged = last - options.flags["log_every"] - (options.flags["steps_per_execution"] - 1)
    first = max(first, logged, length.online_from)
    if run.online_teacher is None:
        return None
    return find_unfit_logits(
        run.targets.batches(first, last), run.online_teacher, run.store.spec.make_codec()
    )
