"""pipeline.flags.classes: files of class names and class maps; every bad line is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.flags.classes import read_class_map, read_class_names, resolve_class_map

TEACHER = ("tabby", "crane", "tiger", "crane", "bus")
LABELS = ("cat", "vehicle", "bird")


def resolve(path: Path, *, names: tuple[str, ...] | None = TEACHER) -> tuple[tuple[int, int], ...]:
    return resolve_class_map(
        str(path), read_class_map(str(path)), num_classes=5, class_names=names, labels=LABELS
    )


def test_class_names(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_bytes("\ufefftabby, tabby cat \r\nMöwe\n\n".encode())
    assert read_class_names(str(path)) == ("tabby, tabby cat", "Möwe")


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"", ["empty"]),
        (b"a\n\nb\n", ["line 2", "1 to 1,000"]),
        (b"a\nb\x1b[31m\n", ["line 2", r"b\x1b[31m"]),
        (b"a\n" + b"b" * 1001, ["line 2", "1,000"]),
        (b"a\n\xff\n", ["UTF-8"]),
    ],
    ids=["empty", "blank", "escape", "long", "latin"],
)
def test_class_names_that_are_refused(tmp_path: Path, content: bytes, parts: list[str]) -> None:
    path = tmp_path / "names.txt"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_class_names(str(path))
    for part in (f"--class_names={path}", *parts):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["0,0\n2,0\n4,1\n", "tabby,cat\n tiger , cat\nbus,vehicle", "bus,1\n\ntiger,0\ntabby,0"]
)
def test_a_class_map_by_index_and_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "map.csv").write_text(text)
    assert resolve(tmp_path / "map.csv") == ((0, 0), (2, 0), (4, 1))


def test_numbers_that_are_all_names_are_names(tmp_path: Path) -> None:
    path = tmp_path / "map.csv"
    path.write_text("1,10\n2,2\n")
    rows = read_class_map(str(path))
    found = resolve_class_map(str(path), rows, num_classes=5, class_names=None, labels=("1", "10", "2"))
    assert found == ((1, 1), (2, 2))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["empty"]),
        ("0,0\n1\n", ["line 2", "'1'", "two values"]),
        ("0,0\n1,0,3\n", ["line 2", "1,0,3"]),
        ("0,0\n1,\n", ["line 2", "'1,'"]),
        ('0,0\n"1,0\n', ["line 2", "CSV"]),
        ("0,0\n5,0\n", ["line 2", "5", "0 to 4"]),
        ("0,0\n1,3\n", ["line 2", "3", "0 to 2"]),
        ("0,0\n-1,0\n", ["line 1", "0 to 4"]),
        ("0,0\n\n0,1\n", ["line 3", "0", "line 1"]),
        ("tabby,cat\nlion,cat\n", ["line 2", "lion", "tabby"]),
        ("tabby,cat\nbus,Cat\n", ["line 2", "Cat", "'cat'"]),
        ("tabby,cat\ncrane,bird\n", ["line 2", "crane", "1, 3", "indices"]),
        ("tabby,cat\n4,vehicle\n", ["line 2", "4"]),
        ("0,cat\n1,\x1b[1m\n", ["line 2", r"\x1b[1m"]),
    ],
)
def test_a_bad_line_of_a_class_map_is_named(tmp_path: Path, text: str, parts: list[str]) -> None:
    path = tmp_path / "map.csv"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        resolve(path)
    for part in (f"--class_map={path}", *parts):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_of_a_teacher_without_class_names_are_refused(tmp_path: Path) -> None:
    (tmp_path / "map.csv").write_text("0,0\ntabby,0\n")
    with pytest.raises(UserError, match=r"line 1: 0: .*--class_names"):
        resolve(tmp_path / "map.csv", names=None)
