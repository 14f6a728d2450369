"""pipeline.store.codecs: round trips, their error, and what does not fit."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from pipeline.errors import DataError, UserError
from pipeline.store.codecs import Codec, Encoded, make_codec
from pipeline.store.softmax import fidelity, log_softmax
from tests.stores import CODECS

T = 2.0
LOGITS = np.random.default_rng(0).normal(0, 8, (200, 7)).astype(np.float32)
HARD = {
    "tiny": [0.0, 1e-8, -3e-8, 6e-8, 1e-5, 2e-7, -1e-6],
    "denormal": [0.0, 1e-40, -1e-39, 3e-41, 0.0, 1e-45, -1e-45],
    "wide": [-65000.0, 1e-5, 65000.0, 3.0, -2.0, 1.0, 0.0],
    "equal": [2.7] * 7,
    "zero": [0.0] * 7,
    "far": [1000.0, 1000.1, 1000.2, 999.9, 1000.3, 1000.4, 1000.5],
    "ties": [1.0, 3.0, 3.0, 1.0, 1.0, 3.0, 3.0],
    "negative": [-5.0, -9.0, -5.5, -8.0, -7.0, -6.0, -5.1],
}


def codec_of(name: str, classes: int = 7, *, temperature: float = T) -> Codec:
    return make_codec(name, classes, temperature=temperature)


def through(codec: Codec, logits: np.ndarray) -> np.ndarray:
    return codec.decode(codec.encode(logits))


# What TensorFlow does.


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("compiled", [False, True], ids=["graph", "xla"])
def test_graph_round_trip_equals_encode_and_decode(name: str, compiled: bool) -> None:
    """Law 8: online logits pass through what stored ones have passed through, to the last bit."""
    generator = np.random.default_rng(1)
    wide = generator.normal(0, 1, (500, 40)) * 10 ** generator.uniform(-3, 3, (500, 1)) + generator.normal(
        0, 9
    )
    for logits in (LOGITS, np.array(list(HARD.values()), np.float32), wide.astype(np.float32)):
        codec = codec_of(name, logits.shape[1])
        in_graph = tf.function(codec.round_trip, jit_compile=compiled)(tf.constant(logits)).numpy()
        expected = through(codec, logits)
        assert in_graph.dtype == expected.dtype == np.float32
        if name == "float16" or name.startswith("topk"):  # TensorFlow's threads take denormals for 0
            in_graph, expected = (np.where(np.abs(x) < 2.0**-14, 0, x) for x in (in_graph, expected))
        np.testing.assert_array_equal(in_graph, expected)


@pytest.mark.parametrize("name", CODECS)
def test_round_trip_compiles_for_batches_of_any_size(name: str) -> None:
    codec = codec_of(name)
    function = tf.function(codec.round_trip, input_signature=[tf.TensorSpec([None, 7], tf.float32)])
    np.testing.assert_array_equal(function(LOGITS[:3]), through(codec, LOGITS[:3]))


# Errors.


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("case", ["random", *HARD])
def test_logits_that_differ_a_little_are_stored_within_what_is_allowed(name: str, case: str) -> None:
    codec = codec_of(name)
    logits = LOGITS if case == "random" else np.array([HARD[case]], np.float32)
    slack = np.float32(1e-4) * np.abs(logits).max(axis=1, keepdims=True)
    for seed in range(5):
        other = logits + slack * np.random.default_rng(seed).uniform(-1, 1, logits.shape).astype(np.float32)
        difference = np.abs(through(codec, logits) - through(codec, other))
        assert (difference <= codec.allowed_difference(logits, slack)).all()


@pytest.mark.parametrize("name", CODECS)
def test_another_logit_is_beyond_what_is_allowed(name: str) -> None:
    codec = codec_of(name)
    slack = np.float32(1e-4) * np.abs(LOGITS).max(axis=1, keepdims=True)
    other = LOGITS.copy()
    np.put_along_axis(
        other, LOGITS.argmax(axis=1)[:, np.newaxis], LOGITS.max(axis=1, keepdims=True) + 0.5, axis=1
    )
    difference = np.abs(through(codec, LOGITS) - through(codec, other))
    assert (difference > codec.allowed_difference(LOGITS, slack)).any(axis=1).all()


@pytest.mark.parametrize(("name", "bits"), [("float32", 24), ("bfloat16", 8), ("float16", 11)])
def test_floats_are_rounded_to_their_width(name: str, bits: int) -> None:
    relative = np.abs(through(codec_of(name), LOGITS) / LOGITS - 1)
    assert relative.max() <= 2.0**-bits
    assert relative.max() > 2.0 ** -(bits + 1) or name == "float32"


def test_int8_is_within_half_a_step_and_keeps_both_ends() -> None:
    decoded = through(codec_of("int8"), LOGITS)
    step = np.ptp(LOGITS, axis=1, keepdims=True) / 255
    assert (np.abs(decoded - LOGITS) <= 0.5001 * step + 1e-5).all()
    for end in (np.min, np.max):
        np.testing.assert_allclose(end(decoded, axis=1), end(LOGITS, axis=1), atol=0.02)
    encoded = codec_of("int8").encode(LOGITS)
    assert encoded["logits"].min(axis=1).tolist() == [-128] * 200
    assert encoded["logits"].max(axis=1).tolist() == [127] * 200
    plain = encoded["logits_offset"][:, None] + encoded["logits_scale"][:, None] * encoded["logits"]
    np.testing.assert_array_equal(decoded, plain)  # what readers without this project do


@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("count", [1, 3, 6])
def test_topk_keeps_the_largest_and_the_mass_of_the_rest(temperature: float, count: int) -> None:
    codec = codec_of(f"topk:{count}", temperature=temperature)
    decoded = through(codec, LOGITS)
    kept = np.argsort(-LOGITS, axis=1)[:, :count]
    rounded = np.take_along_axis(LOGITS, kept, axis=1).astype(np.float16)
    np.testing.assert_array_equal(np.take_along_axis(decoded, kept, axis=1), rounded)
    p, q = (np.exp(log_softmax(x, temperature)) for x in (LOGITS, decoded))
    p_rest, q_rest = (1 - np.take_along_axis(x, kept, axis=1).sum(axis=1) for x in (p, q))
    np.testing.assert_allclose(q_rest, p_rest, atol=0.01)
    rest = np.sort(decoded, axis=1)[:, : 7 - count]
    assert (rest == rest[:, :1]).all()
    assert codec.only_temperature == temperature


@pytest.mark.parametrize(("classes", "dtype"), [(65_536, np.uint16), (65_537, np.int32)])
def test_topk_has_room_for_every_class(classes: int, dtype: type) -> None:
    logits = np.zeros((1, classes), np.float32)
    logits[0, [7, classes - 1]] = 3, 4
    codec = codec_of("topk:2", classes)
    encoded = codec.encode(logits)
    assert encoded["logits_classes"].dtype == dtype
    assert encoded["logits_classes"].tolist() == [[classes - 1, 7]]
    np.testing.assert_allclose(codec.decode(encoded), logits, atol=1e-5)


@pytest.mark.parametrize("classes", [102, 1000])
def test_int8_at_ten_is_closer_than_1e_5(classes: int) -> None:
    logits = np.random.default_rng(0).normal(0, 4, (300, classes)).astype(np.float32)
    kl, _ = fidelity(logits, through(codec_of("int8", classes), logits), 10.0)
    assert kl / 300 < 1e-5


# What does not fit.


@pytest.mark.parametrize(("name", "largest"), [("float16", 65504), ("topk:3", 65504)])
def test_a_logit_that_does_not_fit_is_refused_with_its_value(name: str, largest: int) -> None:
    logits = LOGITS.copy()
    logits[3, 2] = 70000
    message = rf"view 8: .*\b70000\b.*`codec`={name}.*\b{largest}\b.*`codec`=float32"
    with pytest.raises(DataError, match=message):
        codec_of(name).encode(logits, first_view=5)
    for other in ("float32", "bfloat16", "int8"):
        codec_of(other).encode(logits)


def test_a_range_that_does_not_fit_is_refused() -> None:
    logits = LOGITS.copy()
    logits[3, :2] = 3e38, -3.1e38
    with pytest.raises(DataError, match=r"view 3: .*-3\.1e\+38 .*`codec`=int8"):
        codec_of("int8").encode(logits, first_view=0)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_logit_that_is_not_finite_is_refused(name: str, value: float) -> None:
    logits = LOGITS.copy()
    logits[3, 2] = value
    with pytest.raises(DataError, match=f"view 3: .*{value:g} .*`codec`={name}"):
        codec_of(name).encode(logits, first_view=0)


@pytest.mark.parametrize(
    "name", ["float8", "topk", "topk:", "topk:0", "topk:05", "topk:-1", "topk:1e3", "", "int8 "]
)
def test_an_unknown_codec_is_refused_with_the_known_ones(name: str) -> None:
    expected = f"`codec`={name}: .*float32, bfloat16, float16, int8, topk:K"
    with pytest.raises(UserError, match=expected):
        codec_of(name)


@pytest.mark.parametrize("count", [7, 8, 999_999])
def test_topk_of_all_classes_is_refused(count: int) -> None:
    with pytest.raises(UserError, match=rf"`codec`=topk:{count}: .*\b7\b"):
        codec_of(f"topk:{count}")


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("float32", {"logits": np.full((200, 7), np.nan, np.float32)}),
        ("float16", {"logits": np.full((200, 7), np.inf, np.float16)}),
        ("int8", {"logits_scale": np.full(200, np.inf, np.float32)}),
        ("int8", {"logits_offset": np.full(200, np.nan, np.float32)}),
        ("topk:3", {"logits_rest": np.full(200, -np.inf, np.float32)}),
        ("topk:3", {"logits_classes": np.full((200, 3), 7, np.uint16)}),
    ],
)
def test_columns_that_no_encoder_gives_are_refused(name: str, changes: Encoded) -> None:
    codec = codec_of(name)
    with np.errstate(all="ignore"), pytest.raises(ValueError, match=r"not finite|class 7 of 7"):
        codec.decode(codec.encode(LOGITS) | changes)


# Bytes.


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("float32", {"logits": "0000803f000000000000803f000080bf"}),
        ("bfloat16", {"logits": "803f0000803f80bf"}),
        ("float16", {"logits": "003c0000003c00bc"}),
        ("int8", {"logits": "7fff7f80", "logits_scale": "0081003c", "logits_offset": "0000813b"}),
        ("topk:2", {"logits": "003c003c", "logits_classes": "00000200", "logits_rest": "d663a03e"}),
    ],
)
def test_stored_bytes_are_little_endian(name: str, stored: dict[str, str]) -> None:
    """Golden values: they may change with the store's format version alone."""
    encoded = codec_of(name, 4, temperature=1.0).encode(np.array([[1.0, 0.0, 1.0, -1.0]], np.float32))
    assert {column: values.tobytes().hex() for column, values in encoded.items()} == stored


@pytest.mark.parametrize("name", CODECS)
def test_columns_are_as_declared(name: str) -> None:
    codec = codec_of(name)
    encoded = codec.encode(LOGITS)
    assert encoded.keys() == codec.columns.keys() == codec.features().keys()
    for column, values in encoded.items():
        declared = codec.columns[column]
        assert values.dtype == declared.dtype
        assert values.shape == ((200,) if declared.size is None else (200, declared.size))
    assert codec.bytes_per_view == sum(values.nbytes for values in encoded.values()) / 200
