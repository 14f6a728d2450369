"""pipeline.store.layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.store.layout import below, split_directory, split_name


@pytest.mark.parametrize(("split", "name"), [("views", ""), ("test", "eval"), ("train", "eval")])
def test_views_are_in_the_store_itself(split: str, name: str) -> None:
    assert below(split) == name
    assert split_directory("store", split) == Path("store", name)


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "/a", "a\n", "a" * 101, 1, None])
def test_a_name_that_could_be_a_path_is_no_split(name: Any) -> None:
    with pytest.raises(ValueError, match="split"):
        split_name(name)
    assert split_name("train_2.0-b") == "train_2.0-b"
