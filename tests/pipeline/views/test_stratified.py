"""pipeline.views.stratified: one random value per interval."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.views.stratified import stratified_sample


@pytest.mark.parametrize("count", [1, 2, 7, 99, 100, 101])
def test_one_value_per_interval(count: int) -> None:
    chosen = stratified_sample(np.arange(1000, 1100), count, seed=0, stream="test")
    places = np.arange(len(chosen))
    assert len(chosen) == min(count, 100)
    assert (chosen - 1000 >= places * 100 // len(chosen)).all()
    assert (chosen - 1000 < (places + 1) * 100 // len(chosen)).all()


def test_golden_values() -> None:
    """May change only with a new sample of `inspect`, of the value range and of the accuracy."""
    chosen = stratified_sample(range(1000), 8, seed=3, stream="test")
    assert chosen.tolist() == [119, 183, 299, 450, 535, 717, 752, 924]
