"""The order of an epoch: a keyed bijection of `0..N-1` that is evaluated at a position, in O(1).

A shuffled index array would cost a worker 14 million draws before its first view of ImageNet-21k. A format-preserving permutation
(Black and Rogaway, "Ciphers with arbitrary finite domains", 2002) costs a few multiplications per position: a generalized Feistel
network over `Z_a x Z_b` with `a * b` just above `N`, and cycle walking for the few values outside. It only has to look random; it is
not a cipher.
"""

from __future__ import annotations

import math

import numpy as np

from pipeline.views.keys import stream_key

# A chi-squared test over all permutations of 3, 4 and 5 elements shows no bias from 6 rounds on; this is twice as many.
ROUNDS = 12
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)  # finalizer of SplitMix64 (Steele et al. 2014)
_MIX2 = np.uint64(0x94D049BB133111EB)


def _hash(values: np.ndarray, key: np.uint64) -> np.ndarray:
    """Keyed 64-bit hash of uint64 values, with the finalizer of SplitMix64."""
    mixed = (values + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) ^ key
    mixed = (mixed ^ mixed >> np.uint64(30)) * _MIX1
    mixed = (mixed ^ mixed >> np.uint64(27)) * _MIX2
    return mixed ^ mixed >> np.uint64(31)


def _permute_domain(values: np.ndarray, keys: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """One pass of the network over `0 .. rows * columns - 1`."""
    left, right = np.divmod(values, np.uint64(columns))
    for number, key in enumerate(keys):
        # The upper 32 bits of the hash, scaled to the range of the half that they are added to.
        if number % 2 == 0:
            shift = (_hash(right, key) >> np.uint64(32)) * np.uint64(rows) >> np.uint64(32)
            left = (left + shift) % np.uint64(rows)
        else:
            shift = (_hash(left, key) >> np.uint64(32)) * np.uint64(columns) >> np.uint64(32)
            right = (right + shift) % np.uint64(columns)
    return left * np.uint64(columns) + right


def examples_at(positions: np.ndarray, *, num_examples: int, seed: int, epoch: int) -> np.ndarray:
    """The examples at some positions of an epoch.

    Args:
      positions: integers in 0..num_examples-1, any shape [...].
      num_examples: N, 1 to 2**40.
      seed: seed of the view axis.
      epoch: 0 or more.

    Returns:
      int64 [...], a bijection of 0..N-1 for each (seed, epoch).
    """
    return permute(positions, size=num_examples, key=stream_key(seed, "order", epoch))


def permute(positions: np.ndarray, *, size: int, key: np.ndarray) -> np.ndarray:
    """Evaluates a keyed bijection of `0..size-1` at some positions.

    Args:
      positions: integers in 0..size-1, any shape [...].
      size: 1 to 2**40.
      key: uint64 [2], from `stream_key`.

    Returns:
      int64 [...].
    """
    # size <= rows * columns < size + sqrt(size) + 1, so cycle walking is rare.
    rows = math.isqrt(size - 1) + 1
    columns = -(-size // rows)
    # Key of each round: the two words of the Philox key, hashed with the number of the round.
    first, second = key
    with np.errstate(over="ignore"):  # arithmetic is modulo 2**64
        keys = _hash(np.arange(ROUNDS, dtype=np.uint64) ^ second, first)
        out = _permute_domain(np.atleast_1d(positions).astype(np.uint64), keys, rows, columns)
        while (outside := out >= size).any():
            out[outside] = _permute_domain(out[outside], keys, rows, columns)
    return out.astype(np.int64).reshape(np.shape(positions))


def example_of_view(views: np.ndarray, *, num_examples: int, seed: int) -> np.ndarray:
    """The example of each view: view indices int64 [...], 0 or more, to int64 [...]."""
    views = np.asarray(views, np.int64)
    epochs, positions = np.divmod(views, num_examples)
    out = np.empty_like(views)
    for epoch in np.unique(epochs):
        where = epochs == epoch
        out[where] = examples_at(positions[where], num_examples=num_examples, seed=seed, epoch=int(epoch))
    return out
