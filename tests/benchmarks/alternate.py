"""Rates of several things in one process, in turns, so that a machine whose speed drifts slows all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def measure(contenders: dict[str, Callable[[], int]], *, rounds: int) -> dict[str, list[float]]:
    """Runs each contender once a round, after one round that does not count.

    Args:
      contenders: name to a function that does some seconds of work and returns how many views it did.
      rounds: that count.

    Returns:
      Views a second, by name, one a round.
    """
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, work in contenders.items():
            begun = time.perf_counter()
            views = work()
            rate = views / (time.perf_counter() - begun)
            if number:
                rates[name].append(rate)
            print(f"round {number} {name}: {rate:,.0f} views/s", flush=True)
    return rates


def median(rates: list[float]) -> float:
    """Of a contender's rounds."""
    return statistics.median(rates)


def ratio(rates: dict[str, list[float]], name: str, reference: str) -> float:
    """Median over rounds of the ratio of two contenders' rates in the same round."""
    return statistics.median(a / b for a, b in zip(rates[name], rates[reference], strict=True))
