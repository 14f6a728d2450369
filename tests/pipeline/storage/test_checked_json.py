"""pipeline.storage.checked_json: what an annotation takes, and that all else is refused with the field's name."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NotRequired, TypedDict

import pytest

from pipeline.errors import UserError
from pipeline.storage.checked_json import MAX_TEXT, ShapeError, build


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


def test_a_tree_of_the_right_shape_is_built() -> None:
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
def test_any_other_shape_is_refused_with_its_place(change: dict[str, Any], path: str) -> None:
    with pytest.raises(ShapeError, match=f"^{path}: ") as caught:
        build(File, WHOLE | change)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("name", ["box", "kind", "lengths"])
def test_what_is_missing_is_named(name: str) -> None:
    with pytest.raises(ShapeError, match=f"^{name}: missing"):
        build(File, {key: value for key, value in WHOLE.items() if key != name})


@pytest.mark.parametrize("tree", [None, [], "text", 3, True])
def test_a_file_that_is_no_object_is_refused(tree: Any) -> None:
    with pytest.raises(ShapeError, match="expected an object"):
        build(File, tree)
