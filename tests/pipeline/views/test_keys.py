"""pipeline.views.keys: streams compared to a Philox in plain Python, and golden values."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from pipeline.views.keys import below, random_words, stream_key, unit_float64

MASK = (1 << 64) - 1


def philox4x64(key: tuple[int, int], counter: int) -> list[int]:
    """Philox4x64-10 (Salmon et al. 2011) in Python's integers."""
    words = [(counter >> (64 * i)) & MASK for i in range(4)]
    first, second = key
    for _ in range(10):
        left, right = 0xD2E7470EE14C6C93 * words[0], 0xCA5A826395121157 * words[2]
        words = [
            (right >> 64) ^ words[1] ^ first,
            right & MASK,
            (left >> 64) ^ words[3] ^ second,
            left & MASK,
        ]
        first, second = (first + 0x9E3779B97F4A7C15) & MASK, (second + 0xBB67AE8584CAA73B) & MASK
    return words


def test_key_is_blake2b_over_seed_stream_and_integers() -> None:
    digest = hashlib.blake2b(b"3\x00order\x005", digest_size=16).digest()
    assert stream_key(3, "order", 5).tolist() == [
        int.from_bytes(digest[:8], "little"),
        int.from_bytes(digest[8:], "little"),
    ]


def test_golden_key_and_words() -> None:
    """May change only with pipeline.store.spec.FORMAT_VERSION: every draw follows from them."""
    assert stream_key(0, "box").tolist() == [0xA5F3F2ECC727CFD8, 0xBBBD3629D349F284]
    assert random_words(stream_key(0, "box"), 2, 1).tolist() == [
        [0xB28A86335634CEDE, 0x5B1C743C87AC75ED, 0x84DFF6225CAA4FE, 0x76981967352226BB]
    ]


@pytest.mark.parametrize("blocks", [1, 3])
def test_words_are_philox_at_the_elements_counter(blocks: int) -> None:
    key = stream_key(11, "mixup")
    words = random_words(key, 40, 5, blocks=blocks)
    for row in range(5):
        expected: list[int] = []
        for block in range(blocks):  # NumPy counts up before it generates
            expected += philox4x64((int(key[0]), int(key[1])), (40 + row) * blocks + block + 1)
        assert words[row].tolist() == expected


def test_an_element_does_not_depend_on_where_drawing_began() -> None:
    key = stream_key(0, "flip")
    whole = random_words(key, 0, 100, blocks=2)
    for start in (0, 1, 37, 99):
        np.testing.assert_array_equal(random_words(key, start, 100 - start, blocks=2), whole[start:])


def test_streams_seeds_and_integers_never_share_a_key() -> None:
    """Seeds are hashed, not added: seed 1 of epoch 2 is not seed 2 of epoch 1."""
    keys = {
        tuple(stream_key(seed, stream, *integers).tolist())
        for seed in range(12)
        for stream in ("order", "box", "flip", "mixup", "window")
        for integers in ((), (0,), (1,), (2,), (11,), (1, 1))
    }
    assert len(keys) == 12 * 5 * 6


def test_unit_float_ends() -> None:
    words = np.array([0, (1 << 11) - 1, 1 << 63, MASK], np.uint64)
    assert unit_float64(words).tolist() == [0.0, 0.0, 0.5, 1 - 2.0**-53]


def test_below_covers_its_range_evenly() -> None:
    words = random_words(stream_key(0, "t"), 0, 5000).ravel()
    counts = np.bincount(below(words, np.array(7)), minlength=7)
    assert len(counts) == 7
    assert abs(counts - len(words) / 7).max() < 5 * np.sqrt(len(words) / 7)
    assert below(np.array([MASK], np.uint64), np.array(2**31)).tolist() == [2**31 - 1]
    assert below(np.array([MASK], np.uint64), np.array(1)).tolist() == [0]
