"""pipeline.pages.views: replayed views match the trainer's input."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import DataError
from pipeline.inputs.locate import open_dataset
from pipeline.pages.views import replay_views
from pipeline.store.reader import Store
from tests import stores
from tests.runs import forge_records


def test_views_match_the_store_in_the_given_order(published_store: Path, data_dir: Path) -> None:
    store = Store(published_store)
    wanted = np.array([50, 3, 16])
    records = store.views.read(wanted)
    found = list(replay_views(store, open_dataset(store, "views", data_dir=str(data_dir)), wanted))
    assert [view.own.view for view in found] == [50, 3, 16]
    assert [view.partner.view for view in found] == [34, 4, 0]  # the last position's is the epoch's first
    for row, view in enumerate(found):
        assert view.own.example == records.example[row]
        assert view.own.box.tolist() == records.box[row].tolist()
        assert (view.own.flipped, view.ratio) == (records.flip[row], records.ratio[row])
        np.testing.assert_array_equal(view.logits, records.logits[row])
        own, partner, mixed = np.split(view.tiles().astype(np.float32), 3, axis=1)
        assert np.abs(view.ratio * own + (1 - view.ratio) * partner - mixed).max() <= 0.51
        assert own.shape == (stores.SIZE, stores.SIZE, 3)


def test_a_crop_with_another_fingerprint_is_refused(
    published_store: Path, data_dir: Path, tmp_path: Path
) -> None:
    forged = Path(shutil.copytree(published_store, tmp_path / "store"))
    forge_records(forged, 12, crop_hash=7)
    store = Store(forged)
    with pytest.raises(DataError, match=r"view 12 .*crop"):
        list(replay_views(store, open_dataset(store, "views", data_dir=str(data_dir)), np.array([12])))
