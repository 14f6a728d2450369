"""pipeline.inputs.locate: a store's data set and teacher are found again, from anywhere, and compared."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import DataError, UserError
from pipeline.inputs import embedded
from pipeline.inputs import locate as provenance
from pipeline.precompute import main
from pipeline.store.reader import StoreReader
from pipeline.store.spec import Spec
from pipeline.verify import main as verify
from tests.stores import Asked


def with_provenance(spec: Spec, **entries: Any) -> Spec:
    return dataclasses.replace(spec, provenance=entries)


def test_what_is_given_is_taken(spec: Spec) -> None:
    recorded = with_provenance(spec, directory="/nowhere", data_dir="data", teacher="teacher")
    assert provenance.find_data_dir(recorded, "mine") == "mine"
    assert provenance.find_teacher(recorded, "mine", store="store") == "mine"


def test_relative_paths_are_found_from_another_directory(
    asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Precompute with relative paths in one directory; verify the store from another, with no path but its own."""
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copytree(asked.data_dir, home / "data")
    shutil.copytree(asked.teacher, home / "teacher")
    relative = Asked(Path("data"), Path("teacher"), Path("stores/one"))
    monkeypatch.chdir(home)
    assert main(relative.flags("--epochs=1")) == 0
    monkeypatch.chdir(elsewhere)
    store = home / "stores" / "one"
    recorded = Spec.load(store).provenance
    assert (recorded["data_dir"], recorded["teacher"]) == ("data", "teacher")  # as given
    assert recorded["directory"] == str(home)
    assert verify([f"--store={store}"]) == 0
    assert provenance.open_dataset(StoreReader(store), "views", data_dir=None).num_examples == 17
    # The whole tree was moved: relative to where one is now.
    home.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    assert verify(["--store=stores/one"]) == 0
    monkeypatch.chdir(elsewhere)
    with pytest.raises(UserError, match=f"`data_dir`.*{home}/data"):
        verify([f"--store={tmp_path}/moved/stores/one"])


def test_a_store_that_says_no_directory_is_looked_for_here(
    spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "teacher").mkdir()
    recorded = with_provenance(spec, data_dir="data", teacher="teacher")
    assert provenance.find_data_dir(recorded, None) == "data"
    assert provenance.find_teacher(recorded, None, store="store") == "teacher"


def test_a_teacher_or_data_set_that_is_nowhere_is_asked_for(spec: Spec, tmp_path: Path) -> None:
    gone = with_provenance(spec, directory=str(tmp_path), teacher="no/teacher", data_dir="no/data")
    with pytest.raises(UserError, match=f"`teacher`.*{tmp_path}/no/teacher"):
        provenance.find_teacher(gone, None, store="store")
    with pytest.raises(UserError, match=f"`data_dir`.*{tmp_path}/no/data"):
        provenance.find_data_dir(gone, None)


def test_a_teacher_in_a_bucket_that_the_store_names_is_not_loaded_unasked(spec: Spec) -> None:
    """It is code, and anybody who made the store may have put it there."""
    remote = with_provenance(spec, directory="/d", teacher="gs://bucket/teacher")
    with pytest.raises(UserError, match="pass `teacher`=gs://bucket/teacher"):
        provenance.find_teacher(remote, None, store="store")
    assert provenance.find_teacher(remote, "gs://bucket/teacher", store="store") == "gs://bucket/teacher"


def test_tfds_default_directory_and_urls_are_left_to_tfds(spec: Spec) -> None:
    assert provenance.find_data_dir(with_provenance(spec, directory="/d", data_dir=None), None) is None
    remote = with_provenance(spec, directory="/d", data_dir="gs://bucket/data")
    assert provenance.find_data_dir(remote, None) == "gs://bucket/data"


def test_a_wrong_data_dir_for_the_embedded_default_is_told_to_be_left_out(
    spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not to be built by `tfds build`, which does not know it."""
    monkeypatch.setenv("VIEW_DISTILL_CACHE", str(tmp_path / "cache"))
    default = with_provenance(spec, embedded_default=True)
    with pytest.raises(UserError) as caught:
        provenance.find_data_dir(default, str(tmp_path))
    assert str(caught.value).startswith(f"`data_dir`={tmp_path}: ")
    assert "mnist_5k" in str(caught.value)
    assert "tfds build" not in str(caught.value)
    (tmp_path / "copy" / embedded.DATASET).mkdir(parents=True)
    assert provenance.find_data_dir(default, str(tmp_path / "copy")) == str(tmp_path / "copy")
    assert not (tmp_path / "cache").exists()


def test_another_data_set_is_refused_with_both_sides(published_store: Path, other_data_dir: Path) -> None:
    with pytest.raises(DataError, match=r"fingerprint: \w+ here, \w+ in the store"):
        provenance.open_dataset(StoreReader(published_store), "views", data_dir=str(other_data_dir))


def test_another_teacher_is_refused_with_both_sides(spec: Spec, keras_teacher_path: Path) -> None:
    with pytest.raises(DataError, match=r"fingerprint: \w{64} here, \w{64} in the spec"):
        provenance.load_teacher(spec, str(keras_teacher_path))


def test_a_store_that_names_no_teacher_asks_for_it(spec: Spec) -> None:
    """As a shared store does, whose provenance was removed."""
    with pytest.raises(UserError, match="`teacher` is missing") as caught:
        provenance.find_teacher(with_provenance(spec), None, store="store")
    assert "None" not in str(caught.value)
