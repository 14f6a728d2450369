"""Figures of two runs (losses, weights, predictions) and of their costs. Uses NumPy alone.

Curves are int64 steps and float64 values; predictions are int32 classes by image; weights are dicts of arrays.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from pipeline.inputs.labels import UNLABELED
from pipeline.precomputing.break_even import break_even_students

_RESAMPLES = 10_000
_COVERAGE = 0.95


@dataclasses.dataclass(frozen=True)
class Curve:
    """A figure by step.

    Attributes:
      steps: int64 [n], ascending.
      values: float64 [n].
    """

    steps: np.ndarray
    values: np.ndarray

    def thinned(self, count: int) -> list[list[float]]:
        """At most `count` evenly spaced points `[step, value]`, including the first and the last.

        Args:
          count: Maximum number of points, 2 or more.
        """
        rows = np.arange(len(self.steps))
        if len(rows) > count:
            rows = np.linspace(0, len(rows) - 1, count).round().astype(np.int64)
        return [[int(self.steps[row]), float(self.values[row])] for row in rows]


def loss_figures(a: Curve, b: Curve) -> dict[str, Any]:
    """Compares two loss curves at their common steps.

    Returns:
      `largest_loss_difference` (absolute), `largest_loss_difference_step` (its first occurrence) and `mean_loss` of `a`;
      None for each if there is no common step.
    """
    steps, ours, theirs = np.intersect1d(a.steps, b.steps, return_indices=True)
    if not len(steps):
        return dict.fromkeys(("largest_loss_difference", "largest_loss_difference_step", "mean_loss"))
    difference = np.abs(a.values[ours] - b.values[theirs])
    row = int(difference.argmax())
    return {
        "largest_loss_difference": float(difference[row]),
        "largest_loss_difference_step": int(steps[row]),
        "mean_loss": float(a.values[ours].mean()),
    }


def weight_figures(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> dict[str, Any]:
    """Compares the weights of two students.

    Returns:
      `weights_distance`, the L2 distance over all weights; `weights_distance_relative`, the same divided by the norm of
      `a`; `weights_largest_difference`, absolute.

    Raises:
      ValueError: names or shapes differ.
    """
    if {name: array.shape for name, array in a.items()} != {name: array.shape for name, array in b.items()}:
        raise ValueError("weights of different networks")
    squares, norm, largest = 0.0, 0.0, 0.0
    for name, array in a.items():
        ours, theirs = array.astype(np.float64), b[name].astype(np.float64)
        squares += float(np.square(ours - theirs).sum())
        norm += float(np.square(ours).sum())
        largest = max(largest, float(np.abs(ours - theirs).max(initial=0.0)))
    return {
        "weights_distance": squares**0.5,
        "weights_distance_relative": (squares / norm) ** 0.5 if norm else 0.0,
        "weights_largest_difference": largest,
    }


def prediction_figures(a: np.ndarray, b: np.ndarray, labels: np.ndarray, *, seed: int = 0) -> dict[str, Any]:
    """Compares the predictions of two students.

    The interval is a paired bootstrap over the images (percentiles; Efron and Tibshirani 1993). It covers the choice of
    test images, not the choice of the students' seeds. Accuracies exclude unlabeled images.

    Returns:
      `agreement` of the two, 0 to 1; `top1_difference`, a - b; `top1_interval`, its 95 % interval. The last two are None
      if no image is labeled.
    """
    agreement = float((a == b).mean())
    labeled = labels != UNLABELED
    if not labeled.any():
        return {"agreement": agreement, "top1_difference": None, "top1_interval": None}
    difference = ((a == labels).astype(np.int64) - (b == labels))[labeled]
    count = len(difference)
    # A resample of n differences of -1, 0 or 1 is a draw of three counts: the same distribution at 1 / n of the cost.
    shares = [(difference == value).mean() for value in (-1, 0, 1)]
    generator = np.random.Generator(np.random.Philox(seed))
    draws = generator.multinomial(count, shares, size=_RESAMPLES)
    means = (draws[:, 2] - draws[:, 0]) / count
    low, high = np.quantile(means, [(1 - _COVERAGE) / 2, (1 + _COVERAGE) / 2])
    return {
        "agreement": agreement,
        "top1_difference": float(difference.mean()),
        "top1_interval": [float(low), float(high)],
    }


def cost_figures(
    seconds_a_step: dict[str, float],
    *,
    batch_size: int,
    teacher_rows: int,
    steps: int,
    precompute_passes: int,
) -> dict[str, Any]:
    """Derives the savings of replaying from measured seconds per step.

    Args:
      seconds_a_step: Seconds of `teacher`, `student`, `input`, `offline` and `online`.
      teacher_rows: Rows that the teacher computes for the B views of a step; more than B if its batches are padded.
      precompute_passes: Images that the teacher processed for the store. Each is charged the teacher's and the input's
        seconds; padding is negligible there.

    Returns:
      `saving`: online / offline - 1.
      `limit`: teacher / student, the saving of a student that waits only for the teacher.
      `teacher_in_step`: online - offline, in seconds.
      `precompute_seconds`: Estimated cost of the store.
      `break_even_students`: Number of students, trained like these runs, that cost as much online as offline with the
        store; None if online is no slower.
    """
    seconds = seconds_a_step
    precompute = precompute_passes * (seconds["teacher"] / teacher_rows + seconds["input"] / batch_size)
    saved = seconds["online"] - seconds["offline"]
    return {
        "saving": seconds["online"] / seconds["offline"] - 1,
        "limit": seconds["teacher"] / seconds["student"],
        "teacher_in_step": saved,
        "precompute_seconds": precompute,
        "break_even_students": break_even_students(precompute, saved_seconds=steps * saved),
    }
