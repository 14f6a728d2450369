"""Counts as messages spell them."""

from __future__ import annotations


def counted(number: float, noun: str) -> str:
    """A count with its noun: `1 epoch`, `3,000 epochs`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
