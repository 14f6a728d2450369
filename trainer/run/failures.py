"""Finds the cause of a failed `fit`: TensorFlow's errors do not name the damaged view or the flag to change."""

from __future__ import annotations

import numpy as np

from pipeline.errors import DataError
from pipeline.errors.causes import find_reason
from pipeline.inputs.device_memory import out_of_memory
from pipeline.views.input import ViewInput

PREFETCHED = 64  # steps whose batches may be in preparation when one of them fails


def explain(error: Exception, view_input: ViewInput, *, first: int, stop: int, remedy: str) -> Exception:
    """The cause of an error of TensorFlow's.

    Args:
      view_input: input pipeline of `fit`; read again to find a damaged view.
      first: first view that may have been in preparation.
      stop: one past the last such view.
      remedy: what to change if a step ran out of memory.

    Returns:
      The project's own error, or `error` if no cause is found.
    """
    if (found := find_reason(error)) is not None:
        return found
    from_input = "{{node IteratorGetNext}}" in str(error)
    if not from_input and (found := out_of_memory(error, remedy)) is not None:
        return found
    for start in range(first, stop, view_input.batch_size):
        try:
            next(view_input.batches(np.array([start])))
        except DataError as cause:
            return cause
    return error
