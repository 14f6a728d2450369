"""The number of students after which a store has paid for its precompute."""

from __future__ import annotations


def break_even_students(precompute_seconds: float, *, saved_seconds: float) -> float | None:
    """Students that cost as much online as offline, with the precompute included.

    Args:
      precompute_seconds: Cost of the store.
      saved_seconds: What one student saves by training on the store.

    Returns:
      A fraction of students; None if a student saves nothing.
    """
    return precompute_seconds / saved_seconds if saved_seconds > 0 else None
