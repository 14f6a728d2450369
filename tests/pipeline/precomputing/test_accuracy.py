"""pipeline.precomputing.accuracy: the teacher's top-1 from stored logits, without unlabeled examples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.inputs.dataset import Dataset
from pipeline.inputs.labels import match_classes
from pipeline.pages.summary import contents_text, find_contents
from pipeline.precomputing.accuracy import record_accuracy
from pipeline.store.accuracy import SplitAccuracy
from pipeline.store.classes import Classes
from pipeline.store.reader import StoreReader
from tests import stores
from tests.images import TEST_IMAGES, encoded_images


@pytest.mark.parametrize("unlabeled", [(), (0, 3), range(7)], ids=["none", "some", "all"])
def test_unlabeled_examples_are_counted_and_left_out(
    store: Path, tmp_path: Path, unlabeled: tuple[int, ...]
) -> None:
    images = {"test": encoded_images(TEST_IMAGES, seed=50)}
    data_dir = stores.prepare_dataset(tmp_path / "data", images, unlabeled=unlabeled)
    opened = StoreReader(store)
    choices = opened.eval_reader("test").read(np.arange(7)).logits.argmax(axis=1)
    labeled = [example for example in range(7) if example not in unlabeled]
    right = sum(choices[example] == example % stores.CLASSES for example in labeled)
    dataset = Dataset(stores.DATASET, "test", data_dir=data_dir)
    match = match_classes(dataset, stores.CLASSES, Classes())
    found = record_accuracy(opened, {"test": dataset}, match)
    assert found["test"] == SplitAccuracy(labeled=len(labeled), correct=int(right), unlabeled=len(unlabeled))
    assert found["test"].top1 == (right / len(labeled) if labeled else None)
    contents = find_contents(StoreReader(store)) | {"whole": True, "checksums": False, "problems": []}
    assert [split["unlabeled"] for split in contents["splits"]] == [None, len(unlabeled)]
    assert (f"test: {len(unlabeled)} examples" in contents_text(contents)) == bool(unlabeled)
