"""Formats counts in messages."""

from __future__ import annotations


def counted(number: float, noun: str) -> str:
    """A count with its noun: `1 epoch`, `3,000 epochs`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def three_digits(value: float) -> str:
    """Three significant digits of a number from 0.0001 to 10^6, never as a power of ten."""
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 1000 else f"{rounded:.3g}"


def bytes_text(value: float) -> str:
    """A size in decimal units, such as `1.25 GB`."""
    for unit, power in (("TB", 12), ("GB", 9), ("MB", 6), ("kB", 3)):
        if value >= 10**power:
            return f"{three_digits(value / 10**power)} {unit}"
    return f"{value:,.0f} B"
