"""trainer.step.schedules: golden values, which change only with the published formula, and edge cases."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from trainer.step.schedules import Scaled, WarmupConstant, WarmupCosine


def test_warmup_cosine_golden_values() -> None:
    schedule = WarmupCosine(total_steps=110, warmup_steps=10)
    steps = [0, 1, 5, 10, 35, 60, 85, 109, 110, 111]
    expected = [0, 0.1, 0.5, 1, 0.8535533906, 0.5, 0.1464466094, 0.000246719817, 0, 0]
    np.testing.assert_allclose(schedule(steps), expected, rtol=1e-6)


def test_warmup_cosine_is_big_visions_formula() -> None:
    steps = np.arange(1001)
    progress = np.clip((steps - 150) / (1000 - 150), 0, 1)
    expected = np.minimum(1, steps / 150) * 0.5 * (1 + np.cos(np.pi * progress))
    actual = WarmupCosine(1000, 150)(steps)
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-12)


def test_warmup_constant_golden_values() -> None:
    np.testing.assert_array_equal(WarmupConstant(4)([0, 1, 2, 4, 5, 10**12]), [0, 0.25, 0.5, 1, 1, 1])
    np.testing.assert_array_equal(WarmupConstant(0)([0, 7]), [1, 1])


def test_scaled_multiplies_the_base() -> None:
    rate = Scaled(0.003, WarmupCosine(110, 10))
    np.testing.assert_allclose(rate([5, 10, 60]), [0.0015, 0.003, 0.0015], rtol=1e-6)
    assert rate(5).dtype == tf.float32


def test_no_step_is_lost_past_float32_integers() -> None:
    start = 2**24
    schedule = WarmupCosine(total_steps=start + 4, warmup_steps=0)
    steps = np.arange(start - 3, start + 5)
    # Near the end, sin(x)^2 equals x^2 within 1e-12.
    expected = (np.pi / 2 * np.arange(7, -1, -1) / (start + 4)) ** 2
    np.testing.assert_allclose(schedule(steps), expected, rtol=1e-6)


def test_warmup_longer_than_the_run_is_the_ramp_alone() -> None:
    np.testing.assert_allclose(WarmupCosine(4, 8)(range(6)), [0, 1 / 8, 2 / 8, 3 / 8, 0, 0], atol=1e-12)
