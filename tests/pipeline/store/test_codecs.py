"""pipeline.store.codecs: round trips, their error, and what does not fit."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from pipeline.errors import DataError, UserError
from pipeline.store.codecs import CODECS, Codec, fidelity, log_softmax

LOGITS = np.random.default_rng(0).normal(0, 8, (200, 7)).astype(np.float32)


@pytest.mark.parametrize("name", CODECS)
def test_graph_round_trip_equals_encode_and_decode(name: str) -> None:
    """Law 8: online logits pass through what stored ones have passed through."""
    codec = Codec(name, 7)
    stored = codec.decode(codec.encode(LOGITS))
    np.testing.assert_array_equal(codec.round_trip(tf.constant(LOGITS)).numpy(), stored)
    assert stored.dtype == np.float32


@pytest.mark.parametrize("name", CODECS)
def test_error_is_within_what_is_allowed(name: str) -> None:
    codec = Codec(name, 7)
    tiny = np.array([[0.0, 1e-8, -3e-8, 6e-8, 1e-5, -65504.0, 1.0]], np.float32)
    for logits in (LOGITS, tiny):
        error = np.abs(codec.decode(codec.encode(logits)) - logits)
        assert (error <= codec.allowed_error(logits)).all()


def test_float32_is_exact_and_float16_is_not() -> None:
    assert (Codec("float32", 7).decode(Codec("float32", 7).encode(LOGITS)) == LOGITS).all()
    assert (Codec("float16", 7).decode(Codec("float16", 7).encode(LOGITS)) != LOGITS).mean() > 0.9


def test_a_logit_that_does_not_fit_is_refused_with_its_value() -> None:
    logits = LOGITS.copy()
    logits[3, 2] = -70000
    with pytest.raises(
        DataError, match=r"logit -70000 does not fit --codec=float16 \(largest 65504\).*float32"
    ):
        Codec("float16", 7).encode(logits)
    assert Codec("float32", 7).encode(logits)[3, 2] == -70000


def test_an_unknown_codec_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="--codec=float8: expected one of float32, float16"):
        Codec("float8", 7)


@pytest.mark.parametrize("name", CODECS)
def test_stored_bytes_are_little_endian(name: str) -> None:
    encoded = Codec(name, 1).encode(np.array([[1.0]], np.float32))
    assert encoded.tobytes() == {"float32": b"\x00\x00\x80\x3f", "float16": b"\x00\x3c"}[name]


def test_log_softmax_of_large_logits() -> None:
    log_p = log_softmax(np.array([[1000.0, 0.0], [0.0, 0.0]], np.float32), 2.0)
    np.testing.assert_allclose(log_p, [[0.0, -500.0], [-np.log(2), -np.log(2)]], atol=1e-12)


def test_fidelity_against_the_definition() -> None:
    decoded = LOGITS + np.float32(0.25) * np.sign(LOGITS)
    p, q = (np.exp(x.astype(float) / 3) for x in (LOGITS, decoded))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    kl, worst = fidelity(LOGITS, decoded, 3.0)
    assert kl == pytest.approx((p * np.log(p / q)).sum())
    assert worst == pytest.approx(0.25, abs=1e-5)
    assert fidelity(LOGITS, LOGITS, 3.0) == (0.0, 0.0)
