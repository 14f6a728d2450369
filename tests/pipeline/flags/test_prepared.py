"""pipeline.flags.prepared and checks of paths before TFDS and TensorFlow are imported."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.flags.precompute import parse
from pipeline.flags.prepared import check_prepared


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    version = tmp_path / "data" / "my_photos" / "1.0.0"
    version.mkdir(parents=True)
    (version / "features.json").write_text("{}")
    return tmp_path / "data"


@pytest.mark.parametrize(
    "name", ["my_photos", "my_photos:1.0.0", "my_photos/config:1.0.0", "namespace:other"]
)
def test_known_names_and_namespaces_pass(prepared: Path, name: str) -> None:
    check_prepared(name, prepared)
    check_prepared("anything", None)
    check_prepared("anything", "gs://bucket/data")


def test_misspelled_name_gets_the_nearest(prepared: Path) -> None:
    with pytest.raises(UserError, match=f"`dataset`=my_photo: .*{prepared}.* my_photos"):
        check_prepared("my_photo", prepared)


def test_other_names_are_listed(prepared: Path) -> None:
    with pytest.raises(UserError, match=r"zebras: .*my_photos.*tfds build zebras"):
        check_prepared("zebras", prepared)


@pytest.mark.parametrize(
    ("flag", "word"),
    [
        ("--dataset=my_photo", "my_photos"),
        ("--teacher=folder", "saved_model.pb"),
        ("--teacher=text.txt", ".keras"),
        ("--store=folder", "image.png"),
    ],
)
def test_wrong_paths_are_refused_by_the_parser(
    prepared: Path, monkeypatch: pytest.MonkeyPatch, flag: str, word: str
) -> None:
    monkeypatch.chdir(prepared.parent)
    Path("folder").mkdir()
    Path("folder/image.png").touch()
    Path("text.txt").touch()
    Path("model.keras").touch()
    flags = {"--dataset": "my_photos", "--teacher": "model.keras", "--store": "new", "--data_dir": "data"}
    name, value = flag.split("=")
    flags[name] = value
    with pytest.raises(UserError) as error:
        parse([*(f"{name}={value}" for name, value in flags.items()), "--epochs=1"])
    assert value in str(error.value)
    assert word in str(error.value)
