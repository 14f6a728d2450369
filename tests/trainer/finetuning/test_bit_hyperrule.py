"""trainer.finetuning.bit_hyperrule: BiT's rule, its schedule and its mixup ratios."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.finetuning.bit_hyperrule import StaircaseDecay, mixup_ratios, rule_mixup_alpha, rule_steps


@pytest.mark.parametrize(
    ("examples", "steps", "alpha"),
    [(1, 500, 0), (19_999, 500, 0), (20_000, 10_000, 0.1), (499_999, 10_000, 0.1), (500_000, 20_000, 0.1)],
)
def test_rule_of_the_paper(examples: int, steps: int, alpha: float):
    assert rule_steps(examples) == steps
    assert rule_mixup_alpha(examples) == alpha


@pytest.mark.parametrize("steps", [1, 4, 5, 500, 10_000, 20_000])
def test_schedule_warms_up_and_decays_by_ten_at_30_60_and_90_percent(steps: int):
    schedule = StaircaseDecay(steps)
    assert schedule.warmup_steps == {1: 0, 4: 0, 5: 1, 500: 100, 10_000: 500, 20_000: 500}[steps]
    t = np.arange(steps + 1)
    ramp = np.minimum(t / schedule.warmup_steps, 1) if schedule.warmup_steps else np.ones(steps + 1)
    passed = sum((t / steps > share).astype(int) for share in (0.3, 0.6, 0.9))
    if steps > 5:  # in tiny runs, the fractions here are off by rounding
        np.testing.assert_allclose(schedule(t), ramp * 0.1**passed, rtol=1e-6)


def test_schedule_around_each_decay():
    schedule = StaircaseDecay(10_000)
    steps = [0, 250, 500, 3000, 3001, 6000, 6001, 9000, 9001, 9999]
    expected = [0, 0.5, 1, 1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    np.testing.assert_allclose(schedule(np.array(steps)), expected, rtol=1e-6)


def test_ratios_are_beta_distributed():
    from scipy import stats

    ratios = mixup_ratios(np.arange(0, 3000 * 512, 512), seed=3, alpha=0.1)
    assert ratios.dtype == np.float32
    assert ratios.min() >= 0
    assert ratios.max() <= 1
    # float32 rounds values within 1e-8 of 1, so the distribution is compared between its tails.
    inner = ratios[(ratios > 1e-6) & (ratios < 1 - 1e-6)]
    beta = stats.beta(0.1, 0.1)
    low, high = beta.cdf([1e-6, 1 - 1e-6])
    assert stats.kstest(inner, lambda x: (beta.cdf(x) - low) / (high - low)).pvalue > 0.01
    assert len(inner) / len(ratios) == pytest.approx(high - low, abs=0.04)


def test_ratio_is_a_function_of_seed_and_block_of_views():
    views = np.array([0, 511, 512, 1023, 5_000_000, 512])
    ratios = mixup_ratios(views, seed=0, alpha=0.1)
    assert ratios[0] == ratios[1]
    assert ratios[2] == ratios[3] == ratios[5] != ratios[0]
    np.testing.assert_array_equal(mixup_ratios(views[::-1], seed=0, alpha=0.1), ratios[::-1])
    assert (mixup_ratios(views, seed=1, alpha=0.1) != ratios).any()


def test_without_mixup_ratios_are_one():
    np.testing.assert_array_equal(mixup_ratios(np.arange(5), seed=0, alpha=0), 1)
