"""Records that no precompute writes, under checksums that fit, and files that chance has damaged: never a wrong record."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import DataError
from pipeline.inputs.dataset import Dataset
from pipeline.store.reader import StoreReader
from pipeline.views.input import ViewInput
from pipeline.views.source import ImageSource
from tests import stores
from tests.campaigns.damaged_store import campaign
from tests.runs import forge_records


def source_of(store: Path, data_dir: Path, *, cache_bytes: int = 0) -> ImageSource:
    dataset = Dataset(stores.DATASET, "train", data_dir=data_dir)
    return ImageSource(dataset, StoreReader(store).spec.policy.renderer(), cache_bytes=cache_bytes)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("ratio", np.nan, "5 float16 logits"),
        ("ratio", 1.5, "5 float16 logits"),
        ("ratio", -0.1, "5 float16 logits"),
        ("box", (-1, 0, 5, 5), "5 float16 logits"),
        ("crop_hash", -1, "5 float16 logits"),
        ("crop_hash", 2**32, "5 float16 logits"),
        ("source_hash", -1, "5 float16 logits"),
        ("source_hash", 2**32, "5 float16 logits"),
        ("example", stores.N, r"view 2 .*\b17\b.*\b16\b"),
        ("example", -1, r"view 2 .*-1\b.*\b16\b"),
        ("example", 2**62, r"view 2 .*\b4611686018427387904\b"),
    ],
)
def test_a_record_that_no_precompute_writes_is_refused(
    store: Path, data_dir: Path, column: str, value: Any, message: str
) -> None:
    forge_records(store, 2, **{column: value})
    with pytest.raises(DataError, match=message):
        StoreReader(store).views.fetch(np.arange(4), source_of(store, data_dir))


@pytest.mark.parametrize("box", [(0, 0, 2**31 - 1, 2**31 - 1), (0, 0, 0, 0)])
@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
def test_a_box_outside_of_its_image_is_refused(
    store: Path, data_dir: Path, box: tuple[int, ...], cache_bytes: int
) -> None:
    forge_records(store, 2, box=box)
    source = source_of(store, data_dir, cache_bytes=cache_bytes)
    with pytest.raises(DataError):
        list(ViewInput(StoreReader(store).views, source, stores.BATCH).batches(np.array([0])))


def summary(counts: collections.Counter[tuple[str, str, str]]) -> dict[str, int]:
    outcomes: collections.Counter[str] = collections.Counter()
    for (_, _, outcome), count in counts.items():
        outcomes[outcome] += count
    return dict(outcomes)


def test_100_damages_are_refused_or_without_effect(store: Path) -> None:
    outcomes = summary(campaign(store, trials=100))
    assert outcomes.keys() == {"refused", "true"}
    assert outcomes["refused"] > 50


@pytest.mark.slow
def test_1000_damages_are_refused_or_without_effect(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = campaign(store, trials=1000, seed=1)
    with capsys.disabled():
        print("", *(f"{' '.join(key)}: {count}" for key, count in sorted(counts.items())), sep="\n")
    assert summary(counts).keys() == {"refused", "true"}
