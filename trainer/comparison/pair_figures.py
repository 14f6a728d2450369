"""How far two runs are apart, and what replaying saves, as numbers. NumPy alone.

Curves are int64 steps and float64 values; predictions are int32 classes by image; weights are dicts of arrays.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from pipeline.inputs.labels import UNLABELED

_RESAMPLES = 10_000
_COVERAGE = 0.95


@dataclasses.dataclass(frozen=True)
class Curve:
    """A figure over steps.

    Attributes:
      steps: int64 [n], ascending.
      values: float64 [n].
    """

    steps: np.ndarray
    values: np.ndarray

    def thinned(self, count: int) -> list[list[float]]:
        """At most `count` (2 or more) points `[step, value]`, evenly chosen, the first and the last among them."""
        rows = np.arange(len(self.steps))
        if len(rows) > count:
            rows = np.linspace(0, len(rows) - 1, count).round().astype(np.int64)
        return [[int(self.steps[row]), float(self.values[row])] for row in rows]


def loss_figures(a: Curve, b: Curve) -> dict[str, Any]:
    """How far two loss curves are apart, at the steps that both have.

    Returns:
      `largest_loss_difference` (absolute) and `largest_loss_difference_step`, the first one where it occurs; `mean_loss`
      of `a`. None for each if they have no step in common.
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
    """How far two students' weights are apart.

    Returns:
      `weights_distance`, L2 over all of them; `weights_distance_relative`, in norms of `a`;
      `weights_largest_difference`, absolute.

    Raises:
      ValueError: they are of different networks.
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
    """How far two students' predictions are apart, int32 [n] each.

    The interval is a paired bootstrap's over the images (percentiles; Efron and Tibshirani 1993): it says how much the
    difference depends on which images were tested on, and nothing of what another seed of the student would give.
    Unlabeled images are left out of both.

    Returns:
      `agreement` of the two, 0 to 1; `top1_difference`, a - b; `top1_interval`, its 95 % interval; None for the last two
      if no image is labeled.
    """
    agreement = float((a == b).mean())
    labeled = labels != UNLABELED
    if not labeled.any():
        return {"agreement": agreement, "top1_difference": None, "top1_interval": None}
    difference = ((a == labels).astype(np.int64) - (b == labels))[labeled]
    count = len(difference)
    # A resample of n differences of -1, 0 or 1 is a draw of how many of each: the same distribution, n times cheaper.
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
    """What replaying saves.

    Args:
      seconds_a_step: `teacher`, `student`, `input`, `offline` and `online`.
      batch_size: B.
      teacher_rows: that the teacher computes for a step's B views; more than B where its batches are padded.
      steps: of a run.
      precompute_passes: images that the teacher ran on for the store, at the teacher's and the input's seconds each; its
        batches there have no padding to speak of.

    Returns:
      `saving`, online / offline - 1; `limit`, teacher / student, of a student that waits for nothing else;
      `teacher_in_step`, online - offline, the seconds that the teacher adds to a step;
      `precompute_seconds`, of the store, reckoned;
      `break_even_students`, trained like these runs, that cost as much online as offline with the store; None if
      online is no slower.
    """
    seconds = seconds_a_step
    precompute = precompute_passes * (seconds["teacher"] / teacher_rows + seconds["input"] / batch_size)
    saved = steps * (seconds["online"] - seconds["offline"])
    return {
        "saving": seconds["online"] / seconds["offline"] - 1,
        "limit": seconds["teacher"] / seconds["student"],
        "teacher_in_step": seconds["online"] - seconds["offline"],
        "precompute_seconds": precompute,
        "break_even_students": precompute / saved if saved > 0 else None,
    }
