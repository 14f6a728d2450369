"""Stratified random samples of sorted values, such as the examples of a split or the views of a store."""

from __future__ import annotations

import numpy as np

from pipeline.views.keys import random_words, stream_key, unit_float64


def stratified_sample(values: np.ndarray | range, count: int, *, seed: int, stream: str) -> np.ndarray:
    """Divides sorted values [n] into `count` intervals and draws one value from each.

    Args:
      values: sorted values. A range costs no memory, however long it is.
      count: number of values to draw; all values are returned if there are no more than that.
      stream: name of the random stream.

    Returns:
      Sorted values [count].
    """
    if len(values) <= count:
        return np.asarray(values)
    words = random_words(stream_key(seed, f"inspect {stream}", count), 0, count)[:, 0]
    bounds = np.arange(count + 1) * len(values) // count
    chosen = bounds[:-1] + (unit_float64(words) * np.diff(bounds)).astype(np.int64)
    return values.start + chosen if isinstance(values, range) else values[chosen]
