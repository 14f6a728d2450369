"""Statistics over a seeded sample of a store's views; the sample is bounded, however large the store is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pipeline.inputs.dataset import Dataset
from pipeline.store.reader import SplitReader, StoreReader
from pipeline.store.softmax import log_softmax
from pipeline.views.headers import image_sizes
from pipeline.views.stratified import stratified_sample

SHARDS, RECORDS = 16, 16_384  # largest sample; each sampled shard is read completely for its checksum
IMAGES = 1024  # largest sample of image headers, for the area histogram
_CHUNK = 256  # records or images in memory
_BINS = 20

OnViews = Callable[[int], Any]


def sample_views(
    reader: SplitReader, *, seed: int, shards: int = SHARDS, records: int = RECORDS
) -> list[np.ndarray]:
    """Draws views of whole epochs from shards all over a split.

    Args:
      shards: largest number of shards.
      records: largest number of views, about.

    Returns:
      One sorted array int64 [n] per shard.
    """
    ends = np.cumsum([shard.records for shard in reader.manifest.shards], dtype=np.int64)
    lengths = np.diff(np.minimum(ends, reader.num_records), prepend=0)
    starts = np.minimum(ends, reader.num_records) - lengths
    chosen = stratified_sample(np.flatnonzero(lengths), shards, seed=seed, stream="shards")
    each = -(-records // len(chosen))
    return [
        stratified_sample(range(starts[n], starts[n] + lengths[n]), each, seed=seed, stream=f"views of {n}")
        for n in chosen.tolist()
    ]


def _histogram(values: np.ndarray, limits: tuple[float, float] | None = (0.0, 1.0)) -> dict[str, Any]:
    """Histogram of values [n]; without limits, from the smallest to the largest value."""
    counts, edges = np.histogram(values, bins=_BINS, range=limits)
    return {"edges": edges.tolist(), "counts": counts.tolist(), "mean": float(values.mean())}


def _entropy(logits: np.ndarray, temperature: float) -> np.ndarray:
    """Entropy of the softmax at a temperature, in nats: [n, C] to float64 [n]."""
    logarithms = log_softmax(logits, temperature)
    return -(np.exp(logarithms) * logarithms).sum(axis=1)


def _chunks(views: np.ndarray) -> list[np.ndarray]:
    return np.array_split(views, -(-len(views) // _CHUNK))


def record_statistics(store: StoreReader, views: list[np.ndarray], *, on_views: OnViews) -> dict[str, Any]:
    """Histograms of the mixup ratio and of the teacher's entropy, at T = 1 and at the store's temperature.

    Args:
      views: views from `sample_views`.
      on_views: called with the number of views after each chunk.

    Raises:
      DataError: a sampled shard is damaged.
    """
    ratios: list[np.ndarray] = []
    entropies: dict[float, list[np.ndarray]] = {1.0: [], store.spec.temperature: []}
    for shard_views in views:
        for chunk in _chunks(shard_views):
            records = store.views.read(chunk)
            ratios.append(records.ratio.astype(np.float64))
            for temperature, found in entropies.items():
                found.append(_entropy(records.logits, temperature))
            on_views(len(chunk))
    most = float(np.log(store.spec.num_classes))
    return {
        "shards": len(views),
        "views": sum(map(len, views)),
        "ratio": _histogram(np.concatenate(ratios)),
        "entropy": _histogram(np.concatenate(entropies[1.0]), (0.0, most)),
        # At a high temperature, all entropies are close to the largest possible one, so the limits follow the data.
        "entropy_at_temperature": _histogram(np.concatenate(entropies[store.spec.temperature]), None),
    }


def area_statistics(
    store: StoreReader, dataset: Dataset, views: list[np.ndarray], *, seed: int, on_views: OnViews
) -> dict[str, Any]:
    """Histogram of the share of the image that the box covers.

    Args:
      views: views from `sample_views`, of which at most `IMAGES` are used.
      on_views: called with the number of views after each chunk.

    Raises:
      DataError: an image cannot be read.
    """
    sample = stratified_sample(np.concatenate(views), IMAGES, seed=seed, stream="areas")
    policy, shares = store.spec.policy, []
    renderer = policy.renderer()
    for chunk in _chunks(sample):
        records = store.views.read(chunk)
        sizes = np.zeros((len(chunk), 2), np.int64)
        if policy.uses_source_sizes:
            sizes = image_sizes(dataset.read(records.example))
        frames = renderer.prepared_shapes(sizes).astype(np.float64)
        shares.append(records.box[:, 2:].astype(np.float64).prod(axis=1) / frames.prod(axis=1))
        on_views(len(chunk))
    return {"views": len(sample), **_histogram(np.concatenate(shares))}
