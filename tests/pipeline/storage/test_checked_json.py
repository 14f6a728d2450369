"""pipeline.storage.checked_json: values that match their annotation; others are refused with the name of the field."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

import pytest

from pipeline.errors import UserError
from pipeline.storage.checked_json import (
    MAX_TEXT,
    ShapeError,
    build,
    is_whole,
    parse_json,
    read_text,
    scalars,
)


@dataclasses.dataclass(frozen=True)
class Box:
    height: int
    scale: float = 1.0
    corners: tuple[float, float] = (0.0, 0.0)
    note: str | None = None
    private: dict[str, str] = dataclasses.field(default_factory=dict, metadata={"json": False})

    def __post_init__(self) -> None:
        if self.height < 1:
            raise UserError(f"height {self.height}: expected 1 or more")


class File(TypedDict):
    box: Box
    kind: Literal["a", "b"]
    lengths: list[str | int]
    names: NotRequired[dict[str, str]]


WHOLE = {"box": {"height": 3}, "kind": "a", "lengths": ["1", 2]}


def test_a_matching_tree_is_built() -> None:
    found = build(File, WHOLE | {"box": {"height": 3, "scale": 2, "corners": [1, 2.5]}, "later": [{}]})
    assert found["box"] == Box(height=3, scale=2, corners=(1, 2.5))
    assert type(found["box"].scale) is int  # as it was written: digests are over that
    assert found["lengths"] == ["1", 2]
    assert found["later"] == [{}]  # type: ignore[typeddict-item]
    assert build(Box, {"height": 1, "note": None}) == Box(height=1)


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"box": {}}, "box.height"),
        ({"box": {"height": 0}}, "box"),
        ({"box": {"height": True}}, "box.height"),
        ({"box": {"height": 1.0}}, "box.height"),
        ({"box": {"height": 10**400}}, "box.height"),
        ({"box": {"height": 1, "scale": float("nan")}}, "box.scale"),
        ({"box": {"height": 1, "scale": 10**400}}, "box.scale"),
        ({"box": {"height": 1, "scale": "1"}}, "box.scale"),
        ({"box": {"height": 1, "scale": None}}, "box.scale"),
        ({"box": {"height": 1, "corners": [1]}}, "box.corners"),
        ({"box": {"height": 1, "corners": [1, "x"]}}, r"box.corners\[1\]"),
        ({"box": {"height": 1, "note": "a\0b"}}, "box.note"),
        ({"box": {"height": 1, "note": "x" * (MAX_TEXT + 1)}}, "box.note"),
        ({"box": {"height": 1, "unknown": 1}}, "box.unknown"),
        ({"box": {"height": 1, "private": {}}}, "box.private"),
        ({"box": []}, "box"),
        ({"kind": "c"}, "kind"),
        ({"kind": ["a"]}, "kind"),
        ({"lengths": [None]}, r"lengths\[0\]"),
        ({"lengths": {"0": 1}}, "lengths"),
        ({"names": {"a": 1}}, "names.a"),
        ({"names": "text"}, "names"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_other_shapes_are_refused_with_their_path(change: dict[str, Any], path: str) -> None:
    with pytest.raises(ShapeError, match=f"^{path}: ") as caught:
        build(File, WHOLE | change)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("name", ["box", "kind", "lengths"])
def test_a_missing_key_is_named(name: str) -> None:
    with pytest.raises(ShapeError, match=f"^{name}: "):
        build(File, {key: value for key, value in WHOLE.items() if key != name})


@pytest.mark.parametrize("tree", [None, [], "text", 3, True])
def test_a_file_that_is_not_an_object_is_refused(tree: Any) -> None:
    with pytest.raises(ShapeError, match="object"):
        build(File, tree)


def test_text_is_read_up_to_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("ä" * 5)
    assert read_text(path, limit=10) == "ä" * 5
    with pytest.raises(ValueError, match="9 bytes"):
        read_text(path, limit=9)
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match="utf-8"):
        read_text(path, limit=10)


def test_pipes_and_directories_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(OSError, match=str(path)):
            read_text(path, limit=10)
    with pytest.raises(FileNotFoundError):
        read_text(tmp_path / "absent", limit=10)


@pytest.mark.parametrize("text", ["NaN", "[Infinity]", '{"a": -Infinity}', "[" * 100_000, "", "{"])
def test_text_that_is_not_json_is_refused(text: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # of any message
        parse_json(text)
    assert not isinstance(caught.value, RecursionError)


def test_json_is_parsed() -> None:
    assert parse_json('{"a": [1, 2.5, null, "x"]}') == {"a": [1, 2.5, None, "x"]}


@pytest.mark.parametrize("value", [True, 1.0, "1", None, 0, 4])
def test_is_whole(value: Any) -> None:
    assert not is_whole(value, 1, 3)
    assert is_whole(1, 1, 3)
    assert is_whole(3, 1, 3)


def test_mappings_of_scalars_are_no_deeper_than_allowed() -> None:
    tree = {"a": {"b": 1}, "c": "text", "d": None}
    assert scalars(tree, nested=1) == tree
    for wrong, nested in ((tree, 0), ({"a": [1]}, 1), ([], 1), ({"a": {"b": {"c": 1}}}, 1)):
        with pytest.raises(TypeError, match=r"got (int|dict|list|NoneType|str)"):
            scalars(wrong, nested=nested)
