"""pipeline.inputs.builder: opening a data set runs no code that its metadata name."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tensorflow_datasets as tfds

from pipeline.errors import UserError
from pipeline.inputs.builder import find_builder
from tests.stores import DATASET

MODULE = "imported_by_a_data_set"
NEW = {"pythonClassName": f"{MODULE}.Feature", "jsonFeature": {"json": "{}"}}
OLD = {"type": f"{MODULE}.Feature", "content": {}}


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file that the module leaves when it is imported."""
    (tmp_path / f"{MODULE}.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "mark"
    sys.modules.pop(MODULE, None)


def sequence(feature: dict[str, Any]) -> dict[str, Any]:
    """The feature inside of a sequence whose content is JSON in text."""
    content = {"feature": feature, "length": None}
    name = "tensorflow_datasets.core.features.sequence_feature.Sequence"
    return {"pythonClassName": name, "jsonFeature": {"json": json.dumps(content)}}


@pytest.mark.parametrize("feature", [NEW, OLD, sequence(OLD)], ids=["new", "old", "nested"])
def test_a_module_that_a_data_set_names_is_not_imported(
    data_dir: Path, tmp_path: Path, mark: Path, feature: dict[str, Any]
) -> None:
    place = Path(shutil.copytree(data_dir, tmp_path / "data"))
    path = place / DATASET / "1.0.0" / "features.json"
    features = json.loads(path.read_text())
    if feature is OLD:
        features = OLD
    else:
        features["featuresDict"]["features"]["extra"] = feature
    path.write_text(json.dumps(features))
    for name in (DATASET, f"{DATASET}:1.0.0", "SmallPhotos"):
        with pytest.raises(UserError) as caught:
            find_builder(name, place)
        assert f"{MODULE}.Feature" in str(caught.value)
        assert str(path) in str(caught.value)
    assert not mark.exists()
    with pytest.raises(Exception, match=r".*"):  # TFDS alone
        assert tfds.builder(DATASET, data_dir=place).info.features
    assert mark.exists()
