"""pipeline.views.policies.base: flips, ratios, and each draw a function of its view alone."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from pipeline.views.policies import POLICIES
from pipeline.views.policies.inception import Inception

VIEWS = np.array([0, 1, 2, 1000, 10**9])
SIZES = np.array([[500, 600], [375, 500], [1, 50], [40, 3], [1200, 900]])


def test_golden_flips() -> None:
    """May change only with pipeline.store.spec.FORMAT_VERSION."""
    flips = Inception().draw_flips(np.arange(16), seed=0)
    assert flips.astype(int).tolist() == [1, 1, 1, 1, 0, 0, 1, 0, 0, 0, 1, 0, 1, 1, 0, 0]


def test_golden_ratios() -> None:
    """May change only with pipeline.store.spec.FORMAT_VERSION."""
    assert Inception().draw_ratios(VIEWS, seed=0).tolist() == [
        0.4261741042137146,
        0.5980732440948486,
        0.7981910109519958,
        0.13706135749816895,
        0.3433416485786438,
    ]


@pytest.mark.parametrize("name", ["inception", "light"])
def test_a_view_does_not_depend_on_which_others_are_drawn_with_it(name: str) -> None:
    """2,500 views pass the chunk of 1,024 in which boxes are drawn; order and repeats do not matter."""
    policy = POLICIES[name](mixup_block=3)
    generator = np.random.default_rng(0)
    views = np.arange(5, 2505)
    sizes = generator.integers(1, 700, (len(views), 2))
    whole = (
        policy.draw_boxes(views, seed=4, sizes=sizes),
        policy.draw_flips(views, seed=4),
        policy.draw_ratios(views, seed=4),
    )
    rows = np.concatenate([generator.permutation(len(views))[:1500], [0, 0, 2499]])
    part = (
        policy.draw_boxes(views[rows], seed=4, sizes=sizes[rows]),
        policy.draw_flips(views[rows], seed=4),
        policy.draw_ratios(views[rows], seed=4),
    )
    for all_of_them, some in zip(whole, part, strict=True):
        np.testing.assert_array_equal(some, all_of_them[rows])
    for row in (0, 1023, 1024, 2499):
        one = slice(row, row + 1)
        np.testing.assert_array_equal(policy.draw_boxes(views[one], seed=4, sizes=sizes[one]), whole[0][one])


def test_ratios_are_uniform_and_differ_per_view() -> None:
    ratios = Inception().draw_ratios(np.arange(5000), seed=0)
    assert ratios.dtype == np.float32
    assert stats.kstest(ratios, "uniform").pvalue > 1e-3
    assert len(np.unique(ratios)) > 4990


def test_folded_ratios_are_the_larger_of_r_and_its_complement() -> None:
    views = np.arange(2000)
    ratios = Inception().draw_ratios(views, seed=0)
    folded = Inception(mixup_fold=True).draw_ratios(views, seed=0)
    np.testing.assert_array_equal(folded, np.where(ratios >= 0.5, ratios, np.float32(1) - ratios))
    assert folded.min() >= 0.5


def test_a_block_of_views_shares_its_ratio() -> None:
    views = np.arange(700, 1300)
    blocked = Inception(mixup_block=512).draw_ratios(views, seed=0)
    single = Inception().draw_ratios(np.array([1, 2]), seed=0)
    np.testing.assert_array_equal(blocked, np.where(views < 1024, single[0], single[1]))


def test_mixup_off_is_ratio_one() -> None:
    assert (Inception(mixup=False, mixup_fold=True).draw_ratios(np.arange(9), seed=0) == 1).all()


@pytest.mark.parametrize(("probability", "share"), [(0.0, 0.0), (1.0, 1.0), (0.25, 0.25)])
def test_flip_probability(probability: float, share: float) -> None:
    flips = Inception(flip_probability=probability).draw_flips(np.arange(8000), seed=0)
    assert abs(flips.mean() - share) < (0.02 if 0 < share < 1 else 1e-12)


def test_seeds_give_other_views() -> None:
    sizes = np.tile([300, 400], (100, 1))
    first = Inception().draw_boxes(np.arange(100), seed=0, sizes=sizes)
    second = Inception().draw_boxes(np.arange(100), seed=1, sizes=sizes)
    assert (first != second).any(axis=1).mean() > 0.95
    # Nor is a seed a shift of the view axis.
    assert (first[1:] != second[:-1]).any(axis=1).mean() > 0.95
