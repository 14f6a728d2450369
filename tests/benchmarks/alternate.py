"""Measures rates of several contenders in turns, so that a drift of the machine's speed affects all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def measure(contenders: dict[str, Callable[[], int]], *, rounds: int) -> dict[str, list[float]]:
    """Runs each contender once per round, after a first round that does not count.

    Args:
      contenders: Functions by name. Each works for some seconds and returns its number of views.
      rounds: Number of rounds that count.

    Returns:
      Views per second of each round, by name.
    """
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, work in contenders.items():
            started = time.perf_counter()
            views = work()
            rate = views / (time.perf_counter() - started)
            if number:
                rates[name].append(rate)
            print(f"round {number} {name}: {rate:,.0f} views/s", flush=True)
    return rates


def median(rates: list[float]) -> float:
    """Median over the rounds of a contender."""
    return statistics.median(rates)


def ratio(rates: dict[str, list[float]], name: str, reference: str) -> float:
    """Median over rounds of the ratio of two contenders' rates in the same round."""
    return statistics.median(a / b for a, b in zip(rates[name], rates[reference], strict=True))
