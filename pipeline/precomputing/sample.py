"""A seeded sample of a store's views, and what is counted over it; bounded, however large the store is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pipeline.inputs.dataset import Dataset
from pipeline.store.codecs import log_softmax
from pipeline.store.reader import SplitReader, Store
from pipeline.views.headers import image_sizes
from pipeline.views.keys import random_words, stream_key, unit_float64

SHARDS, RECORDS = 16, 16_384  # at most: a shard is read whole for its checksum
IMAGES = 1024  # whose headers are read for the shares of their boxes
_AT_ONCE = 256  # records or images: bounds memory
_BINS = 20

Count = Callable[[int], Any]


def _uniform(seed: int, stream: str, count: int) -> np.ndarray:
    return unit_float64(random_words(stream_key(seed, f"inspect {stream}", count), 0, count)[:, 0])


def spread(values: np.ndarray | range, count: int, *, seed: int, stream: str) -> np.ndarray:
    """One of each of `count` stretches of sorted values [n], chosen by chance; all, if there are no more."""
    if len(values) <= count:
        return np.asarray(values)
    bounds = np.arange(count + 1) * len(values) // count
    chosen = bounds[:-1] + (_uniform(seed, stream, count) * np.diff(bounds)).astype(np.int64)
    # Of a range no array is made: how long a shard is, the manifest says.
    return values.start + chosen if isinstance(values, range) else values[chosen]


def sample_views(
    reader: SplitReader, *, seed: int, shards: int = SHARDS, records: int = RECORDS
) -> list[np.ndarray]:
    """Views of whole epochs from shards all over a split: int64 [n], sorted, one array a shard."""
    ends = np.cumsum([shard.records for shard in reader.manifest.shards], dtype=np.int64)
    lengths = np.diff(np.minimum(ends, reader.num_records), prepend=0)
    starts = np.minimum(ends, reader.num_records) - lengths
    chosen = spread(np.flatnonzero(lengths), shards, seed=seed, stream="shards")
    each = -(-records // len(chosen))
    return [
        spread(range(starts[n], starts[n] + lengths[n]), each, seed=seed, stream=f"views of {n}")
        for n in chosen.tolist()
    ]


def _histogram(values: np.ndarray, limits: tuple[float, float] | None = (0.0, 1.0)) -> dict[str, Any]:
    """Of values [n]; from the least to the greatest without limits."""
    counts, edges = np.histogram(values, bins=_BINS, range=limits)
    return {"edges": edges.tolist(), "counts": counts.tolist(), "mean": float(values.mean())}


def _entropy(logits: np.ndarray, temperature: float) -> np.ndarray:
    """Of the teacher's softmax at a temperature, in nats: [n, C] to float64 [n]."""
    logarithms = log_softmax(logits, temperature)
    return -(np.exp(logarithms) * logarithms).sum(axis=1)


def count_records(store: Store, views: list[np.ndarray], *, on_views: Count) -> dict[str, Any]:
    """Histograms of mixup ratio and of the teacher's entropy, at T = 1 and at the store's temperature.

    Args:
      store: the store.
      views: from `sample_views`.
      on_views: called with numbers of views done.

    Raises:
      DataError: a sampled shard is damaged.
    """
    ratios: list[np.ndarray] = []
    entropies: dict[float, list[np.ndarray]] = {1.0: [], store.spec.temperature: []}
    for of_shard in views:
        for part in np.array_split(of_shard, -(-len(of_shard) // _AT_ONCE)):
            records = store.views.read(part)
            ratios.append(records.ratio.astype(np.float64))
            for temperature, found in entropies.items():
                found.append(_entropy(records.logits, temperature))
            on_views(len(part))
    most = float(np.log(store.spec.num_classes))
    return {
        "shards": len(views),
        "views": sum(map(len, views)),
        "ratio": _histogram(np.concatenate(ratios)),
        "entropy": _histogram(np.concatenate(entropies[1.0]), (0.0, most)),
        # A high temperature makes them all alike, and near the greatest that there can be.
        "entropy_at_temperature": _histogram(np.concatenate(entropies[store.spec.temperature]), None),
    }


def count_areas(
    store: Store, dataset: Dataset, views: list[np.ndarray], *, seed: int, on_views: Count
) -> dict[str, Any]:
    """Histogram of the boxes' shares of their images.

    Args:
      store: the store.
      dataset: that it was made from.
      views: from `sample_views`; `IMAGES` of them are looked at.
      seed: of the choice.
      on_views: called with numbers of views done.

    Raises:
      DataError: an image cannot be read.
    """
    some = spread(np.concatenate(views), IMAGES, seed=seed, stream="areas")
    policy, shares = store.spec.policy, []
    for part in np.array_split(some, -(-len(some) // _AT_ONCE)):
        records = store.views.read(part)
        sizes = np.zeros((len(part), 2), np.int64)
        if policy.uses_source_sizes:
            sizes = image_sizes(dataset.read(records.example))
        frames = policy.box_frames(sizes).astype(np.float64)
        shares.append(records.box[:, 2:].astype(np.float64).prod(axis=1) / frames.prod(axis=1))
        on_views(len(part))
    return {"views": len(some), **_histogram(np.concatenate(shares))}
