"""pipeline.store.classes: `classes.json` is read as it was written, and refused where it was edited."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import DataError, UserError
from pipeline.store.classes import Classes, classes_json, read_classes
from pipeline.store.layout import CLASSES_FILE
from pipeline.store.spec import Spec
from tests.stores import CLASSES

NAMES = tuple(f"n\u00e4me {number}" for number in range(CLASSES))


@pytest.mark.parametrize(
    "classes",
    [
        Classes(),
        Classes(label_feature="none"),
        Classes(label_feature="kind", names=NAMES, class_map=((0, 7), (4, 7))),
    ],
)
def test_classes_are_read_as_written(tmp_path: Path, spec: Spec, classes: Classes) -> None:
    assert read_classes(tmp_path, spec) == Classes()
    (tmp_path / CLASSES_FILE).write_text(classes_json(classes, spec))
    assert read_classes(tmp_path, spec) == classes


@pytest.mark.parametrize(
    "fields",
    [
        {"names": ["a"]},
        {"names": ["a"] * (CLASSES - 1) + ["\x1b[1m"]},
        {"names": 5},
        {"label_feature": ""},
        {"class_map": []},
        {"class_map": [[CLASSES, 0]]},
        {"class_map": [[0, -1]]},
        {"class_map": [[0, 1, 2]]},
        {"class_map": [[0, 1], [0, 2]]},
        {"other": 1},
    ],
)
def test_an_edited_file_is_refused(tmp_path: Path, spec: Spec, fields: dict[str, Any]) -> None:
    (tmp_path / CLASSES_FILE).write_text(json.dumps({"spec": spec.digest(), "classes": fields}))
    with pytest.raises(DataError, match=CLASSES_FILE) as caught:
        read_classes(tmp_path, spec)
    assert str(caught.value).isprintable()


def test_the_file_of_another_store_is_refused(tmp_path: Path, spec: Spec) -> None:
    (tmp_path / CLASSES_FILE).write_text(json.dumps({"spec": "0" * 64, "classes": {}}))
    with pytest.raises(DataError, match=spec.digest()[:16]):
        read_classes(tmp_path, spec)


def test_a_map_with_a_teacher_class_twice_is_refused() -> None:
    with pytest.raises(UserError):
        Classes(class_map=((1, 0), (1, 2)))
