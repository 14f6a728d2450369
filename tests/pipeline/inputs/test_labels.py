"""pipeline.inputs.labels: the teacher's classes against those of a data set."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pipeline.errors import DataError
from pipeline.inputs.labels import UNLABELED, match_classes
from pipeline.store.classes import Classes

LOGITS = np.array([[0.0, 5, 1, 2], [3, 5, 1, 2], [0, 9, 4, 2]], np.float32)


@dataclasses.dataclass
class Labeled:
    """A data set whose example i has label i modulo the number of its classes."""

    class_names: list[str]
    name: str = "animals:1.0.0"

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def labels(self, examples: np.ndarray) -> np.ndarray:
        return examples % self.num_classes


def test_the_same_number_of_classes_are_the_same_classes() -> None:
    match = match_classes(Labeled(["a", "b", "c", "d"]), 4, Classes())
    assert (match.no_accuracy, match.note, list(match.names)) == (None, None, ["a", "b", "c", "d"])
    assert match.predict(LOGITS).tolist() == [1, 1, 1]
    assert match.label_of(3) == 3
    assert match.labels(Labeled(["a", "b"]), np.arange(3)).tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("labels", "names", "parts"),
    [
        (["a", "b"], None, ["4 classes", "animals:1.0.0 has 2"]),
        ([], None, ["4 classes", "animals:1.0.0 has no labels"]),
        (["a", "b", "c", "d"], ("a", "b", "C", "d"), ["class 2", "'C'", "'c'"]),
    ],
    ids=["other_number", "no_labels", "other_names"],
)
def test_other_classes_have_no_accuracy(
    labels: list[str], names: tuple[str, ...] | None, parts: list[str]
) -> None:
    dataset = Labeled(labels)
    match = match_classes(dataset, 4, Classes(names=names))
    for part in parts:
        assert part in str(match.no_accuracy)
        assert part in str(match.note)
    assert match.labels(dataset, np.arange(3)).tolist() == [UNLABELED] * 3
    assert match.label_of(1) is None
    assert len(match.names) == 4
    assert match.predict(LOGITS).tolist() == [1, 1, 1]


def test_a_data_set_whose_names_are_numbers_matches_any_names() -> None:
    names = ("zero", "one", "two", "three")
    match = match_classes(Labeled(["0", "1", "2", "3"]), 4, Classes(names=names))
    assert (match.no_accuracy, match.names) == (None, names)


def test_a_class_map_predicts_among_the_mapped_classes() -> None:
    """Class 1, which has the largest logits, stands for no label; classes 0 and 3 stand for the same one."""
    dataset = Labeled(["a", "b", "c"])
    match = match_classes(dataset, 4, Classes(class_map=((0, 2), (2, 0), (3, 2))))
    assert match.predict(LOGITS).tolist() == [2, 2, 0]
    assert [match.label_of(number) for number in range(4)] == [2, None, 0, 2]
    assert match.no_accuracy is None
    assert "3 of the teacher's 4 classes stand for 2 of the 3 classes" in str(match.note)
    assert match.labels(dataset, np.arange(3)).tolist() == [0, 1, 2]
    with pytest.raises(DataError, match=r"class 2, but animals:1\.0\.0 has 2"):
        match_classes(Labeled(["a", "b"]), 4, Classes(class_map=((0, 2),)))
