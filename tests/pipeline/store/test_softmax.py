"""pipeline.store.softmax: the error of a codec, against its definition."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.store.softmax import fidelity, log_softmax

LOGITS = np.random.default_rng(0).normal(0, 8, (200, 7)).astype(np.float32)


def test_log_softmax_of_large_logits() -> None:
    log_p = log_softmax(np.array([[1000.0, 0.0], [0.0, 0.0]], np.float32), 2.0)
    np.testing.assert_allclose(log_p, [[0.0, -500.0], [-np.log(2), -np.log(2)]], atol=1e-12)


def test_a_kl_is_never_below_zero() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):  # of each, rounding alone is left, and is negative for some
        logits = generator.normal(0, 1, (1, 102)).astype(np.float32)
        assert fidelity(logits, logits + np.float32(64), 10.0)[0] >= 0


def test_fidelity_against_the_definition() -> None:
    decoded = LOGITS + np.float32(0.25) * np.sign(LOGITS)
    p, q = (np.exp(x.astype(float) / 3) for x in (LOGITS, decoded))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    kl, worst = fidelity(LOGITS, decoded, 3.0)
    assert kl == pytest.approx((p * np.log(p / q)).sum())
    assert worst == pytest.approx(0.25, abs=1e-5)
    assert fidelity(LOGITS, LOGITS, 3.0) == (0.0, 0.0)
