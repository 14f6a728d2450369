"""pipeline.pages.views: replayed views match the trainer's input."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import DataError
from pipeline.inputs.locate import open_dataset
from pipeline.pages.views import replay_views
from pipeline.store.reader import StoreReader
from tests import stores
from tests.runs import forge_records


def test_views_match_the_store_in_the_given_order(published_store: Path, data_dir: Path) -> None:
    store = StoreReader(published_store)
    wanted = np.array([50, 3, 16])
    records = store.views.read(wanted)
    found = list(replay_views(store, open_dataset(store, "views", data_dir=str(data_dir)), wanted))
    assert [own.index for own, _ in found] == [50, 3, 16]
    assert [partner.index for _, partner in found] == [34, 4, 0]  # the last position's is the epoch's first
    for row, (own, partner) in enumerate(found):
        assert own.example == records.example[row]
        assert own.box == tuple(records.box[row])
        assert (own.flip, own.ratio) == (records.flip[row], records.ratio[row])
        np.testing.assert_array_equal(own.logits, records.logits[row])
        assert own.crop.shape == (stores.SIZE, stores.SIZE, 3)
        np.testing.assert_array_equal(own.partner_crop, partner.crop)
        mixed = own.ratio * own.crop.astype(np.float32) + (1 - own.ratio) * partner.crop
        np.testing.assert_allclose(own.mixed, mixed, atol=1e-4)


def test_a_crop_with_another_fingerprint_is_refused(
    published_store: Path, data_dir: Path, tmp_path: Path
) -> None:
    forged = Path(shutil.copytree(published_store, tmp_path / "store"))
    forge_records(forged, 12, crop_hash=7)
    store = StoreReader(forged)
    with pytest.raises(DataError, match=r"view 12 .*crop"):
        list(replay_views(store, open_dataset(store, "views", data_dir=str(data_dir)), np.array([12])))
