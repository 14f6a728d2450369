"""pipeline.views.order: a bijection, uniform over keys, with golden values."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from pipeline.views.order import example_of_view, examples_at


def epoch_order(num_examples: int, *, seed: int, epoch: int = 0) -> np.ndarray:
    return examples_at(np.arange(num_examples), num_examples=num_examples, seed=seed, epoch=epoch)


@pytest.mark.parametrize("seed", [0, 1, 2**62])
def test_bijective_for_every_small_n_and_some_primes(seed: int) -> None:
    for num_examples in [*range(1, 71), 101, 1009, 1020, 4099, 65537]:
        for epoch in (0, 1, 10_000):
            order = epoch_order(num_examples, seed=seed, epoch=epoch)
            np.testing.assert_array_equal(np.sort(order), np.arange(num_examples), err_msg=str(num_examples))


@pytest.mark.parametrize("num_examples", [3, 4])
def test_all_permutations_are_equally_frequent_over_seeds(num_examples: int) -> None:
    names = {p: i for i, p in enumerate(itertools.permutations(range(num_examples)))}
    drawn = [names[tuple(epoch_order(num_examples, seed=seed))] for seed in range(250 * len(names))]
    assert stats.chisquare(np.bincount(drawn, minlength=len(names))).pvalue > 1e-3


def test_all_permutations_are_equally_frequent_over_epochs() -> None:
    names = {p: i for i, p in enumerate(itertools.permutations(range(3)))}
    drawn = [names[tuple(epoch_order(3, seed=5, epoch=epoch))] for epoch in range(3000)]
    assert stats.chisquare(np.bincount(drawn, minlength=6)).pvalue > 1e-3


def test_every_example_is_equally_frequent_at_every_position() -> None:
    table = np.zeros((7, 7), int)
    for seed in range(7000):
        table[np.arange(7), epoch_order(7, seed=seed)] += 1
    # Rows and columns sum to 7000 each, which leaves 6 * 6 degrees of freedom.
    assert stats.chi2.sf(((table - 1000) ** 2 / 1000).sum(), 36) > 1e-3


def test_golden_orders() -> None:
    """May change only with pipeline.store.spec.FORMAT_VERSION: stored views are of these examples."""
    assert epoch_order(7, seed=0).tolist() == [5, 6, 2, 3, 0, 1, 4]
    assert epoch_order(10, seed=0).tolist() == [0, 5, 4, 7, 8, 6, 1, 3, 9, 2]
    assert epoch_order(10, seed=0, epoch=1).tolist() == [8, 1, 5, 0, 2, 3, 6, 9, 7, 4]
    assert epoch_order(10, seed=1).tolist() == [4, 0, 2, 8, 7, 1, 6, 3, 9, 5]
    far = examples_at(np.array([0, 1, 2, 13_999_999]), num_examples=14_000_000, seed=0, epoch=3)
    assert far.tolist() == [12_562_900, 2_546_026, 619_806, 6_975_214]
    views = np.array([0, 1019, 1020, 51_000_000_000])
    assert example_of_view(views, num_examples=1020, seed=7).tolist() == [198, 55, 77, 787]


def test_a_position_does_not_depend_on_the_others_asked_for() -> None:
    order = epoch_order(101, seed=3, epoch=9)
    for position in (0, 50, 100):
        one = examples_at(np.array(position), num_examples=101, seed=3, epoch=9)
        assert int(one) == order[position]
    mixed = np.array([[7, 7], [100, 0]])
    np.testing.assert_array_equal(examples_at(mixed, num_examples=101, seed=3, epoch=9), order[mixed])


def test_views_of_several_epochs_in_any_order() -> None:
    views = np.array([13, 0, 25, 12, 13, 47])
    expected = [int(epoch_order(13, seed=2, epoch=v // 13)[v % 13]) for v in views]
    assert example_of_view(views, num_examples=13, seed=2).tolist() == expected


def test_the_largest_domain_stays_inside_it() -> None:
    top = 2**40
    out = examples_at(np.array([0, 1, top // 2, top - 1]), num_examples=top, seed=0, epoch=0)
    assert len(set(out.tolist())) == 4
    assert (out >= 0).all()
    assert (out < top).all()
