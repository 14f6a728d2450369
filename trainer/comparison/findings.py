"""Findings of a comparison: the conclusions that its pairs of offline and online runs support."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from trainer.comparison.result_file import Result, Row


def offline_online_pairs(result: Result) -> list[int]:
    """Positions in `pairs` of the offline-online pairs. The other pairs compare ways to make targets."""
    pairs = result.get("pairs") or []
    return [number for number, pair in enumerate(pairs) if (pair["a"], pair["b"]) == ("offline", "online")]


def paired_runs(result: Result, pairs: Sequence[int]) -> list[tuple[Row, Row]]:
    """The two runs of each pair, for pairs whose runs are both in the result."""
    runs = {(run["arm"], run["epochs"], run["seed"]): run for run in result["runs"]}
    selected = [result["pairs"][number] for number in pairs]
    keys = [[(pair[side], pair["epochs"], pair["seed"]) for side in ("a", "b")] for pair in selected]
    return [(runs[a], runs[b]) for a, b in keys if a in runs and b in runs]


def main_epochs(runs: Sequence[Row]) -> float:
    """The length at which most arms were trained; the longest one of several."""
    arms: dict[float, set[str]] = {}
    for run in runs:
        arms.setdefault(run["epochs"], set()).add(run["arm"])
    return max(arms, key=lambda epochs: (len(arms[epochs]), epochs))


@dataclasses.dataclass(frozen=True)
class Findings:
    """Conclusions from the offline-online pairs of a result. Pair numbers are positions in `pairs`.

    Attributes:
      state: `same`: bit-equal losses and weights. `match`: no accuracy difference beyond chance in any pair. `differ`:
        a difference beyond chance in some pair. `unknown`: no pair has an interval.
      largest: Pair with the largest absolute accuracy difference.
      bound: Pair and interval end that is furthest from 0.
      beyond: Number of pairs whose interval excludes 0.
      compared: Number of pairs that have an interval.
      agreement: Pair whose students agree least.
      loss: Pair with the largest loss difference.
    """

    state: Literal["same", "match", "differ", "unknown"]
    largest: int | None = None
    bound: tuple[int, int] | None = None
    beyond: int = 0
    compared: int = 0
    agreement: int | None = None
    loss: int | None = None

    @classmethod
    def of(cls, result: Result) -> Findings:
        """The findings of a result."""
        pairs = {number: result["pairs"][number] for number in offline_online_pairs(result)}
        intervals = {
            number: pair["top1_interval"]
            for number, pair in pairs.items()
            if isinstance(pair.get("top1_interval"), list) and None not in pair["top1_interval"]
        }

        def most(name: str, size: Any = abs) -> int | None:
            values = {number: pair[name] for number, pair in pairs.items() if pair.get(name) is not None}
            return max(values, key=lambda number: size(values[number])) if values else None

        beyond = sum(low > 0 or high < 0 for low, high in intervals.values())
        same = bool(pairs) and all(
            pair.get("largest_loss_difference") == 0 and pair.get("weights_largest_difference") == 0
            for pair in pairs.values()
        )
        ends = {(number, end): abs(interval[end]) for number, interval in intervals.items() for end in (0, 1)}
        return cls(
            state="same" if same else "unknown" if not intervals else "differ" if beyond else "match",
            largest=most("top1_difference"),
            bound=max(ends, key=lambda end: ends[end]) if ends else None,
            beyond=beyond,
            compared=len(intervals),
            agreement=most("agreement", lambda value: -value),
            loss=most("largest_loss_difference"),
        )
