"""pipeline.precomputing.break_even: the number of students that pay for a store."""

from __future__ import annotations

import pytest

from pipeline.precomputing.break_even import break_even_students


def test_students_cost_as_much_online_as_offline_with_the_precompute() -> None:
    students, precompute, saved = break_even_students(300.0, saved_seconds=40.0), 300.0, 40.0
    assert students is not None
    assert students * saved == precompute


@pytest.mark.parametrize("saved", [0.0, -1.0])
def test_store_that_saves_nothing_never_pays(saved: float) -> None:
    assert break_even_students(300.0, saved_seconds=saved) is None
