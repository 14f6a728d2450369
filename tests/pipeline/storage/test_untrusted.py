"""pipeline.storage.untrusted: bounds and shapes; what whole stores do with them is in test_hostile."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import DataError
from pipeline.storage.checked_json import is_whole, parse_json, read_text, scalars
from pipeline.storage.files import check_links
from pipeline.store.layout import split_name


def test_text_is_read_up_to_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("ä" * 5)
    assert read_text(path, limit=10) == "ä" * 5
    with pytest.raises(ValueError, match="longer than 9 bytes"):
        read_text(path, limit=9)
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match="utf-8"):
        read_text(path, limit=10)


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(OSError, match="not a file"):
            read_text(path, limit=10)
    with pytest.raises(FileNotFoundError):
        read_text(tmp_path / "absent", limit=10)


@pytest.mark.parametrize("text", ["NaN", "[Infinity]", '{"a": -Infinity}', "[" * 100_000, "", "{"])
def test_what_is_not_json_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not JSON|nested too deeply|Expecting"):
        parse_json(text)


def test_json_is_what_it_is() -> None:
    assert parse_json('{"a": [1, 2.5, null, "x"]}') == {"a": [1, 2.5, None, "x"]}


@pytest.mark.parametrize("value", [True, 1.0, "1", None, 0, 4])
def test_only_a_whole_number_in_its_range_is_one(value: Any) -> None:
    assert not is_whole(value, 1, 3)
    assert is_whole(1, 1, 3)
    assert is_whole(3, 1, 3)


def test_mappings_of_scalars_are_no_deeper_than_allowed() -> None:
    tree = {"a": {"b": 1}, "c": "text", "d": None}
    assert scalars(tree, nested=1) == tree
    for wrong, nested in ((tree, 0), ({"a": [1]}, 1), ([], 1), ({"a": {"b": {"c": 1}}}, 1)):
        with pytest.raises(TypeError, match="expected"):
            scalars(wrong, nested=nested)


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "/a", "a\n", "a" * 101, 1, None])
def test_a_name_that_could_be_a_path_is_no_split(name: Any) -> None:
    with pytest.raises(ValueError, match="is no name of a split"):
        split_name(name)
    assert split_name("train_2.0-b") == "train_2.0-b"


def test_links_may_lead_about_but_not_out(tmp_path: Path) -> None:
    store = tmp_path / "store"
    (store / "eval").mkdir(parents=True)
    (store / "file").touch()
    (store / "eval" / "inside").symlink_to(store / "file")
    check_links(store, "eval", "absent")
    (store / "eval" / "outside").symlink_to(tmp_path)
    with pytest.raises(DataError, match=rf"eval/outside: a link to {tmp_path}, outside of the store"):
        check_links(store, "eval")
    check_links(store)  # nothing is read there
