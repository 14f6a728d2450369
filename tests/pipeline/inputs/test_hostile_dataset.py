"""Metadata of a foreign TFDS data set: opening it is one line, or a data set whose images are as they were."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import DataError, UserError
from pipeline.inputs.dataset import Dataset
from tests import stores
from tests.mutations import FAST, bounded_memory, dumps, every_mutation, mutations, printable_output

FILES = ("dataset_info.json", "features.json")


class Victim:
    """A data set whose metadata are replaced, and put back."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.directory = data_dir / stores.DATASET / "1.0.0"
        self.trees = {name: json.loads((self.directory / name).read_text()) for name in FILES}
        self.images = Dataset(stores.DATASET, "train", data_dir=data_dir).read(np.arange(3))

    def check(self, trees: dict[str, Any]) -> str:
        for name, tree in {**self.trees, **trees}.items():
            (self.directory / name).write_bytes(dumps(tree))
        with printable_output():
            try:
                dataset = Dataset(stores.DATASET, "train", data_dir=self.data_dir)
                print(dataset.identity(), dataset.num_classes)
                assert len(dataset.class_names) == dataset.num_classes
                examples = np.arange(min(3, dataset.num_examples))
                assert dataset.read(examples) == self.images[: len(examples)]
                dataset.labels(examples)
            except (UserError, DataError) as error:
                print(error)
                return "refused"
        return "read"


@pytest.fixture(scope="module")
def victim(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    victim = Victim(Path(shutil.copytree(data_dir, tmp_path_factory.mktemp("foreign") / "data")))
    assert victim.check({}) == "read"
    with bounded_memory():
        yield victim


@FAST
@given(st.data())
def test_any_metadata_of_a_data_set_are_refused_or_read(victim: Victim, data: st.DataObject) -> None:
    victim.check(data.draw(mutations(victim.trees)))


@pytest.mark.slow
def test_every_change_of_every_field_is_refused_or_read(victim: Victim) -> None:
    outcomes: dict[str, int] = {"refused": 0, "read": 0}
    for what, trees in every_mutation(victim.trees):
        try:
            outcomes[victim.check(trees)] += 1
        except BaseException as error:
            error.add_note(what)
            raise
    assert outcomes["refused"] > 0
