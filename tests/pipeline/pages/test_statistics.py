"""pipeline.pages.statistics: seeded, bounded samples and their histograms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.inputs.dataset import Dataset
from pipeline.pages.statistics import area_statistics, record_statistics, sample_views
from pipeline.store.codecs import make_codec
from pipeline.store.metadata import SplitManifest
from pipeline.store.openers import DiskOpener
from pipeline.store.reader import SplitReader, StoreReader
from pipeline.store.shards import ShardInfo
from pipeline.views.headers import image_sizes
from tests import stores


def reader_of(lengths: list[int], *, num_records: int | None = None) -> SplitReader:
    """A reader of shards without files."""
    shards = tuple(ShardInfo(records=n, bytes=1, sha256="0" * 64, kl=0.0, max_error=0.0) for n in lengths)
    codec = make_codec("float16", 5, temperature=1.0)
    return SplitReader(
        "views",
        SplitManifest(dataset=stores.ANY_DATASET, shards=shards),
        DiskOpener(Path("nowhere"), "views", shards),
        codec=codec,
        num_examples=17,
        num_records=num_records,
    )


def test_only_whole_epochs_are_sampled() -> None:
    """The store ends within an epoch, because its precompute is running."""
    reader = reader_of([20, 20, 11, 11], num_records=51)
    np.testing.assert_array_equal(np.concatenate(sample_views(reader, seed=0)), np.arange(51))


def test_a_sample_is_bounded_seeded_and_from_all_over_the_store() -> None:
    """64,000 shards of 65,536 views: 4 billion views, which must not be listed."""
    reader = reader_of([65_536] * 63_999 + [5])
    sample = sample_views(reader, seed=3)
    assert len(sample) == 16
    assert all(len(views) == 1024 for views in sample)
    for views in sample:
        assert len(np.unique(views // 65_536)) == 1
        assert (np.diff(views) > 0).all()
    first = np.array([views[0] for views in sample]) / reader.num_records
    assert (np.floor(first * 16) == np.arange(16)).all()
    for mine, theirs in zip(sample, sample_views(reader, seed=3), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert not np.array_equal(sample[0], sample_views(reader, seed=4)[0])


def test_all_views_of_a_small_store_are_sampled() -> None:
    sample = sample_views(reader_of([20, 20, 11]), seed=0)
    np.testing.assert_array_equal(np.concatenate(sample), np.arange(51))


def test_the_lengths_of_a_hostile_manifest_take_no_memory() -> None:
    sample = sample_views(reader_of([2**40, 2**40]), seed=0)
    assert [len(views) for views in sample] == [8192, 8192]
    assert sample[1].max() < 2**41


def test_statistics_match_the_records(published_store: Path, data_dir: Path) -> None:
    store = StoreReader(published_store)
    views = sample_views(store.views, seed=0)
    done: list[int] = []
    counted = record_statistics(store, views, on_views=done.append)
    records = store.views.read(np.arange(51))
    assert (counted["shards"], counted["views"], sum(done)) == (3, 51, 51)
    assert counted["ratio"]["mean"] == pytest.approx(records.ratio.mean())
    np.testing.assert_array_equal(counted["ratio"]["counts"], np.histogram(records.ratio, 20, (0, 1))[0])
    for name, temperature in (("entropy", 1.0), ("entropy_at_temperature", 2.0)):
        exponentials = np.exp(records.logits.astype(np.float64) / temperature)
        shares = exponentials / exponentials.sum(axis=1, keepdims=True)
        entropy = -(shares * np.log(shares)).sum(axis=1)
        assert counted[name]["mean"] == pytest.approx(entropy.mean())
        assert sum(counted[name]["counts"]) == 51
        limits = (0.0, np.log(stores.CLASSES)) if name == "entropy" else (entropy.min(), entropy.max())
        assert (counted[name]["edges"][0], counted[name]["edges"][-1]) == pytest.approx(limits)

    dataset = Dataset(stores.DATASET, "train", data_dir=data_dir)
    areas = area_statistics(store, dataset, views, seed=0, on_views=done.append)
    sizes = image_sizes(dataset.read(records.example)).astype(np.float64)
    shares = records.box[:, 2] * records.box[:, 3] / sizes.prod(axis=1)
    assert areas["mean"] == pytest.approx(shares.mean())
    assert sum(areas["counts"]) == areas["views"] == 51
