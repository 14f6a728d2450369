"""Keyed random bits: Philox streams whose counter is the view index.

All random draws of views use this module. A stream has a name; its key is a hash of (seed, name, integers). Philox is counter-based,
so element `i` does not require elements `0..i-1`. Only raw 64-bit words are used, whose values NumPy guarantees across versions;
it does not guarantee those of its samplers. Seeds are hashed, never added, so no two streams or seeds overlap.
"""

from __future__ import annotations

import hashlib

import numpy as np

WORDS_PER_BLOCK = 4  # words per step of Philox4x64's counter


def stream_key(seed: int, stream: str, *integers: int) -> np.ndarray:
    """The Philox key of a stream: uint64 [2], BLAKE2b over (seed, stream name, integers)."""
    text = "\0".join([str(int(seed)), stream, *(str(int(i)) for i in integers)])
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def random_words(key: np.ndarray, start: int, count: int, *, blocks: int = 1) -> np.ndarray:
    """The words of elements `start .. start + count - 1` of a stream.

    Args:
      key: uint64 [2], from `stream_key`.
      start: index of the first element, 0 or more.
      count: number of elements.
      blocks: number of Philox blocks per element; part of the stream's definition.

    Returns:
      uint64 [count, 4 * blocks]. Row `i` depends only on (key, start + i, blocks).
    """
    generator = np.random.Philox(key=key, counter=start * blocks)
    words = generator.random_raw(count * blocks * WORDS_PER_BLOCK)
    return np.asarray(words, np.uint64).reshape(count, blocks * WORDS_PER_BLOCK)


def words_of(elements: np.ndarray, key: np.ndarray, *, blocks: int = 1) -> np.ndarray:
    """The words of elements in any order, with one call of `random_words` per run of consecutive ones.

    Args:
      elements: indices of elements, int64 [n], 0 or more, duplicates allowed.
      key: uint64 [2], from `stream_key`.
      blocks: see `random_words`.

    Returns:
      uint64 [n, 4 * blocks].
    """
    distinct, inverse = np.unique(np.asarray(elements, np.int64), return_inverse=True)
    rows = np.empty((len(distinct), blocks * WORDS_PER_BLOCK), np.uint64)
    starts = np.flatnonzero(np.diff(distinct, prepend=-2) != 1)
    for start, stop in zip(starts, [*starts[1:], len(distinct)], strict=True):
        rows[start:stop] = random_words(key, int(distinct[start]), int(stop - start), blocks=blocks)
    return rows[inverse]


def unit_float64(words: np.ndarray) -> np.ndarray:
    """Uniform float64 in [0, 1) from the upper 53 bits of each word."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def below(words: np.ndarray, bound: np.ndarray) -> np.ndarray:
    """Uniform int64 in [0, bound) from the upper 32 bits of each word. The bias is below bound / 2**32.

    Args:
      words: uint64.
      bound: integer, 1 to 2**31, broadcast against `words`.
    """
    return ((words >> np.uint64(32)) * bound.astype(np.uint64) >> np.uint64(32)).astype(np.int64)
