"""pipeline.store.layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.store.layout import below, split_directory


@pytest.mark.parametrize(("split", "name"), [("views", ""), ("test", "eval"), ("train", "eval")])
def test_views_are_in_the_store_itself(split: str, name: str) -> None:
    assert below(split) == name
    assert split_directory("store", split) == Path("store", name)
