"""trainer.pages.view_grid: pictures of replayed views."""

from __future__ import annotations

import io
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import DataError
from pipeline.inputs.locate import open_dataset
from pipeline.store.reader import StoreReader
from tests import stores
from tests.runs import forge_records
from trainer.pages.view_grid import read_views, save_views


def test_tiles_are_the_views(three_epochs: Path, data_dir: Path, tmp_path: Path) -> None:
    store = StoreReader(three_epochs)
    dataset = open_dataset(store, "views", data_dir=str(data_dir))
    path = save_views(store, dataset, tmp_path / "views.png", views=5)
    shown = read_views(path)
    assert [view.facts["view"] for view in shown] == [0, 12, 25, 38, 50]
    records = store.views.read(np.array([0, 12, 25, 38, 50]))
    assert [view.facts["example"] for view in shown] == records.example.tolist()
    # The partner of the last position of an epoch is the first one.
    assert shown[-1].facts["partner_example"] == store.views.read(np.array([34])).example[0]
    for view, ratio in zip(shown, records.ratio, strict=True):
        assert view.size == stores.SIZE
        with Image.open(io.BytesIO(view.png)) as image:
            own, partner, mixed = np.split(np.asarray(image).astype(np.float32), 3, axis=1)
        assert np.abs(ratio * own + (1 - ratio) * partner - mixed).max() <= 0.51
        assert view.facts["ratio"] == float(ratio)
        assert view.facts["teacher"]["class"] in dataset.class_names


def test_view_with_a_wrong_fingerprint_is_refused(three_epochs: Path, data_dir: Path, tmp_path: Path) -> None:
    forged = Path(shutil.copytree(three_epochs, tmp_path / "store"))
    forge_records(forged, 12, crop_hash=7)
    store = StoreReader(forged)
    with pytest.raises(DataError, match="view 12 "):
        save_views(
            store,
            open_dataset(store, "views", data_dir=str(data_dir)),
            tmp_path / "views.png",
            views=5,
        )
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("content", [b"", b"no picture"])
def test_file_that_is_no_picture_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "views.png"
    path.write_bytes(content)
    with pytest.raises(DataError, match=re.escape(str(path))):
        read_views(path)


def test_another_picture_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "views.png"
    Image.new("RGB", (30, 20)).save(path)
    with pytest.raises(DataError, match=re.escape(str(path))):
        read_views(path)
