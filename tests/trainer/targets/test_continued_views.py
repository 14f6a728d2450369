"""trainer.targets.continued_views: past the last stored view the same sequence of views continues."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import DataError
from pipeline.inputs.dataset import Dataset
from pipeline.store.reader import StoreReader
from tests import stores
from tests.runs import assert_same_batches, forge_records, numpy_batches
from trainer.targets.batches import Targets

BATCH = 8
STEPS = 3 * stores.N // BATCH
CACHE = 1 << 30


def open_targets(
    store: Path, data_dir: Path, *, continued_from: int | None = None, cache: int = 0
) -> Targets:
    return Targets(
        StoreReader(store),
        Dataset(stores.DATASET, "train", data_dir=data_dir),
        batch_size=BATCH,
        image_cache_bytes=cache,
        continued_from=continued_from,
    )


@pytest.mark.parametrize("cache", [0, CACHE], ids=["encoded", "cached"])
@pytest.mark.parametrize(
    "continued_from", [0, 5, stores.N], ids=["from_the_start", "inside_an_epoch", "after_one"]
)
def test_sampled_views_are_those_of_a_longer_store(
    one_epoch: Path, three_epochs: Path, data_dir: Path, continued_from: int, cache: int
):
    stored = numpy_batches(open_targets(three_epochs, data_dir), 0, STEPS)
    targets = open_targets(one_epoch, data_dir, continued_from=continued_from, cache=cache)
    batches = numpy_batches(targets, 0, STEPS)
    for step, (ours, theirs) in enumerate(zip(batches, stored, strict=True)):
        views = np.arange(step * BATCH, (step + 1) * BATCH)
        for name in ("crops", "partner", "ratio"):
            np.testing.assert_array_equal(ours[name], theirs[name])
        np.testing.assert_array_equal(ours["stored"], views < continued_from)
        kept = ours["stored"][:, np.newaxis]
        np.testing.assert_array_equal(ours["logits"], np.where(kept, theirs["logits"], 0))


def test_a_batch_straddles_the_end_of_the_store(one_epoch: Path, data_dir: Path):
    (batch,) = numpy_batches(
        open_targets(one_epoch, data_dir, continued_from=stores.N), 2, 3
    )  # views 16..23 of 17
    assert batch["stored"].tolist() == [True] + [False] * 7
    assert batch["logits"][0].any()
    assert not batch["logits"][1:].any()


def test_resumed_run_has_the_same_batches_on_both_sides_of_the_border(one_epoch: Path, data_dir: Path):
    steps = 6  # 0 and 1 stored, 2 straddles, the rest sampled; epochs end in 2 and 4
    whole = numpy_batches(open_targets(one_epoch, data_dir, continued_from=stores.N), 0, steps)
    fresh = open_targets(one_epoch, data_dir, continued_from=stores.N)
    for step in range(steps):
        assert_same_batches(numpy_batches(fresh, step, steps), whole[step:])


def test_stored_views_of_a_straddling_batch_are_verified(store: Path, data_dir: Path):
    forge_records(store, 50, crop_hash=0xDEADBEEF)
    with pytest.raises(DataError, match=r"view 50 .*deadbeef"):
        list(
            open_targets(store, data_dir, continued_from=51).input.batches(np.array([48]))
        )  # views 48..55 of 51
