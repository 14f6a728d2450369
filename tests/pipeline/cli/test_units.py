"""pipeline.cli.units: counts, numbers and sizes in messages."""

from __future__ import annotations

import pytest

from pipeline.cli.units import bytes_text, counted, three_digits


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 epochs"), (1, "1 epoch"), (3000, "3,000 epochs"), (1.5, "1.5 epochs")]
)
def test_counts_have_their_noun(number: float, text: str) -> None:
    assert counted(number, "epoch") == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.00012345, "0.000123"), (1.0, "1"), (999.6, "1,000"), (12_345.0, "12,300"), (999_999.0, "1,000,000")],
)
def test_numbers_have_three_digits_and_no_power(value: float, text: str) -> None:
    assert three_digits(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1_250_000_000, "1.25 GB"), (23e15, "23,000 TB")],
)
def test_sizes_are_decimal(value: float, text: str) -> None:
    assert bytes_text(value) == text
