"""pipeline.inputs.holdout: a stratified split by content."""

from __future__ import annotations

import collections
import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.inputs.holdout import held_out


def contents(count: int) -> list[bytes]:
    return [hashlib.blake2b(str(i).encode(), digest_size=16).digest() for i in range(count)]


def test_the_split_has_not_changed() -> None:
    """May change only with a note in the changelog: the same folder would give another data set."""
    classes = [name for name in "abc" for _ in range(10)]
    assert sorted(held_out(classes, contents(30), share=0.2, seed=0)) == [4, 9, 10, 15, 20, 21]


@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    share=st.floats(0.05, 0.95),
    seed=st.integers(0, 2**63 - 1),
)
def test_classes_keep_their_share_and_a_training_image(sizes: list[int], share: float, seed: int) -> None:
    classes = [str(number) for number, size in enumerate(sizes) for _ in range(size)]
    try:
        chosen = held_out(classes, contents(len(classes)), share=share, seed=seed)
    except UserError:
        assert round(share * len(classes)) == 0 or all(size == 1 for size in sizes)
        return
    tested = collections.Counter(classes[index] for index in chosen)
    for number, size in enumerate(sizes):
        assert tested[str(number)] < size
        assert tested[str(number)] <= share * size + 1
        assert tested[str(number)] > min(share * size, size - 1) - 1
    most = sum(min(int(share * size) + 1, size - 1) for size in sizes)
    assert len(chosen) == min(round(share * len(classes)), most)


def test_order_does_not_matter_but_the_seed_does() -> None:
    classes, files = ["a"] * 40 + ["b"] * 60, contents(100)
    chosen = {files[index] for index in held_out(classes, files, share=0.1, seed=0)}
    backwards = held_out(classes[::-1], files[::-1], share=0.1, seed=0)
    assert {files[::-1][index] for index in backwards} == chosen
    assert {files[index] for index in held_out(classes, files, share=0.1, seed=1)} != chosen


def test_files_with_the_same_content_stay_together() -> None:
    files = [content for content in contents(10) for _ in range(2)]
    chosen = held_out(["a"] * 20, files, share=0.25, seed=0)
    assert len(chosen) == 4
    assert not {files[index] for index in chosen} & {files[index] for index in set(range(20)) - chosen}


def test_a_share_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match=r"`holdout`=0\.1: .*3 images"):
        held_out(["a", "b", "c"], contents(3), share=0.1, seed=0)
