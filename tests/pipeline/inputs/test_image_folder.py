"""pipeline.inputs.image_folder: which folders are splits and classes, and names that TFDS would not give back."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.errors.text import is_printable
from pipeline.inputs.image_folder import scan, scan_unlabeled


def make(root: Path, *names: str | bytes) -> Path:
    """Empty files: nothing is opened here."""
    for name in names:
        path = root / os.fsdecode(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def test_what_operating_systems_leave_behind_is_skipped_and_counted(tmp_path: Path) -> None:
    clutter = [
        ".DS_Store",
        "cat/.DS_Store",
        "cat/Thumbs.db",
        "dog/desktop.ini",
        "dog/._1.jpg",
        "__MACOSX/cat/1.jpg",
        "@eaDir/x",
    ]
    found = scan(make(tmp_path, "cat/1.jpg", "dog/1.jpg", *clutter))
    assert found.problems == []
    assert found.classes == ["cat", "dog"]
    assert found.skipped == {
        ".DS_Store": 2,
        "Thumbs.db": 1,
        "desktop.ini": 1,
        "._*": 1,
        "__MACOSX": 1,
        "@eaDir": 1,
    }


@pytest.mark.parametrize("name", ["cat ", " cat", "cat\n", "ca\nt", "c\rat", "cat\u00a0", "cat\t"])
def test_a_class_name_that_tfds_would_change_is_refused(tmp_path: Path, name: str) -> None:
    found = scan(make(tmp_path, "cat/1.jpg", f"{name}/1.jpg", "dog/1.jpg"))
    (problem,) = found.problems
    assert "rename" in problem
    assert is_printable(problem)


def test_class_names_that_only_unicode_tells_apart_are_refused(tmp_path: Path) -> None:
    found = scan(make(tmp_path, "train/caf\u00e9/1.jpg", "train/cafe\u0301/2.jpg"))
    (problem,) = found.problems
    assert "Unicode" in problem


@pytest.mark.parametrize("name", [b"caf\xe9/1.jpg", b"cat/caf\xe9.jpg"])
def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path, name: bytes) -> None:
    found = scan(make(tmp_path, "dog/1.jpg", name))
    (problem,) = found.problems
    assert "caf\\xe9" in problem
    assert "UTF-8" in problem


def test_a_split_folder_without_class_folders_is_named_and_the_others_are_not(tmp_path: Path) -> None:
    flat = [f"val/{number}.jpg" for number in range(9)]
    found = scan(make(tmp_path, "train/cat/1.jpg", "train/dog/1.jpg", *flat))
    (problem,) = found.problems
    assert problem.startswith(f"{tmp_path / 'val'}: 9 files")
    assert set(found.splits) == {"train", "validation"}


def test_groups_of_classes_are_not_taken_for_splits(tmp_path: Path) -> None:
    make(tmp_path, "animals/cat/1.jpg", "animals/dog/1.jpg", "vehicles/car/1.jpg")
    with pytest.raises(UserError, match="animals, vehicles") as caught:
        scan(tmp_path)
    assert "train" in str(caught.value)


def test_split_folders_are_known_by_their_usual_names(tmp_path: Path) -> None:
    make(tmp_path, "Train/cat/1.jpg", "VAL/cat/1.jpg", "testing/cat/1.jpg", "extra/cat/1.jpg")
    assert set(scan(tmp_path).splits) == {"train", "validation", "test", "extra"}


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    found = scan(make(tmp_path, "train/1.jpg", "car/1.jpg"))
    assert (found.classes, set(found.splits), found.problems) == (["car", "train"], {"train"}, [])


@pytest.mark.parametrize("name", ["all", "ALL", "my split", "a.b"])
def test_a_split_folder_of_a_name_that_tfds_refuses_is_named(tmp_path: Path, name: str) -> None:
    make(tmp_path, "train/cat/1.jpg", f"{name}/cat/1.jpg")
    with pytest.raises(UserError, match=rf"{re.escape(str(tmp_path / name))}: .*rename the folder"):
        scan(tmp_path)


def test_two_folders_of_one_split_are_refused(tmp_path: Path) -> None:
    make(tmp_path, "train/cat/1.jpg", "val/cat/1.jpg", "validation/cat/1.jpg")
    with pytest.raises(UserError, match="val and validation"):
        scan(tmp_path)


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["1.jpg", "a/2.jpg", "a/b/c/3.jpg", ".DS_Store"], {"train": 3}),
        (["train/1.jpg", "train/a/2.jpg", "test/3.jpg"], {"train": 2, "test": 1}),
        (["train/1.jpg", "2019/2.jpg"], {"train": 2}),
        (["train/1.jpg", "test/2.jpg", "3.jpg"], {"train": 3}),
    ],
)
def test_all_images_below_a_folder_are_found(
    tmp_path: Path, names: list[str], splits: dict[str, int]
) -> None:
    found = scan_unlabeled(make(tmp_path, *names))
    assert {split: len(images) for split, images in found.splits.items()} == splits
    assert (found.classes, found.problems) == (None, [])


def test_an_unlabeled_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        scan_unlabeled(tmp_path)


def test_an_empty_split_folder_is_a_problem(tmp_path: Path) -> None:
    make(tmp_path, "train/1.jpg")
    (tmp_path / "test").mkdir()
    (problem,) = scan_unlabeled(tmp_path).problems
    assert problem.startswith(str(tmp_path / "test"))


def test_a_link_to_a_folder_above_is_refused(tmp_path: Path) -> None:
    make(tmp_path, "a/1.jpg")
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    with pytest.raises(UserError, match=r"again: .*link"):
        scan_unlabeled(tmp_path)


@pytest.mark.parametrize("name", [b"caf\xe9/1.jpg", b"cat/caf\xe9.jpg"])
def test_a_path_without_labels_that_is_not_utf8_is_refused(tmp_path: Path, name: bytes) -> None:
    (problem,) = scan_unlabeled(make(tmp_path, "1.jpg", name)).problems
    assert "caf\\xe9" in problem
