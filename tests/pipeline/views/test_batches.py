"""pipeline.views.batches: the plan of a batch compared to brute force over all small cases."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.views.batches import EXTRA_CROPS, partner_views, plan_batch


def brute_force_partner(view: int, num_examples: int) -> int:
    """Rolled by one over the epoch's views."""
    epoch = [view - view % num_examples + i for i in range(num_examples)]
    return epoch[(view % num_examples + 1) % num_examples]


@pytest.mark.parametrize("num_examples", range(1, 13))
def test_plan_against_brute_force(num_examples: int) -> None:
    for batch_size in range(1, 16):
        for start in [*range(3 * num_examples + 2), 1000 * num_examples - 1, 10**10]:
            views, partner = plan_batch(start, batch_size, num_examples=num_examples)
            batch = list(range(start, start + batch_size))
            wanted = [brute_force_partner(view, num_examples) for view in batch]
            assert views.shape == (batch_size + EXTRA_CROPS,)
            assert views[:batch_size].tolist() == batch
            assert partner.shape == (batch_size,)
            assert views[partner].tolist() == wanted
            # Only the necessary views; unused slots repeat the last one.
            assert set(views.tolist()) == set(batch) | set(wanted)
            used = len(set(views.tolist()))
            assert (views[used:] == views[used - 1]).all()


def test_partner_views_of_any_shape() -> None:
    views = np.array([[0, 1, 2], [3, 5, 8]])
    assert partner_views(views, num_examples=3).tolist() == [[1, 2, 0], [4, 3, 6]]


def test_types() -> None:
    views, partner = plan_batch(0, 4, num_examples=10)
    assert views.dtype == np.int64
    assert partner.dtype == np.int32
