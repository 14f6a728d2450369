"""pipeline.store.splits: names of slices in files, and which splits may share examples."""

from __future__ import annotations

import re

import pytest

from pipeline.store.splits import file_split, may_overlap


@pytest.mark.parametrize(
    ("split", "name"),
    [
        ("test", "test"),
        ("train-clean_1", "train-clean_1"),
        ("train[800:]", "train_from_800"),
        ("train[:800]", "train_to_800"),
        ("train[10%:20.5%]", "train_from_10pct_to_20_2e_5pct"),
        ("train[-5:]", "train_from_-5"),
        ("train[:5] + test[5:]", "train_to_5_and_test_from_5"),
        ("\u00e9", "_e9_"),
    ],
)
def test_name_in_files(split: str, name: str) -> None:
    """Golden: files of stores have these names."""
    assert file_split(split) == name
    assert re.fullmatch(r"[\w-]+", name)  # what TFDS takes


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("train", "test", False),
        ("train", "train[5:]", True),
        ("train[:5]", "train[5:]", False),
        ("train[:6]", "train[5:]", True),
        ("train[:90%]", "train[90%:]", False),
        ("train[:91%]", "train[90%:]", True),
        ("train[:90%]", "train[900:]", True),  # how many 90 % are is not known
        ("train[-5:]", "train[:5]", True),
        ("train[:5]+test[:5]", "test[4:]", True),
        ("train[:5]+test[:5]", "test[5:]", False),
        ("train-clean", "clean", False),
        ("all", "test", True),
    ],
)
def test_overlap(a: str, b: str, expected: bool) -> None:
    assert may_overlap(a, b) == may_overlap(b, a) == expected
