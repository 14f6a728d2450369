"""trainer.config.libtpu: the variables that TensorFlow reads, where the package libtpu is installed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from trainer.config.libtpu import use_libtpu

VARIABLES = ("NEXT_PLUGGABLE_DEVICE_USE_C_API", "TF_PLUGGABLE_DEVICE_LIBRARY_PATH", "TPU_LIBRARY_PATH")


@pytest.fixture(autouse=True)
def _unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k not in VARIABLES})


def test_installed_library_is_used_unless_another_is_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "libtpu").mkdir()
    (tmp_path / "libtpu" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    os.environ["TPU_LIBRARY_PATH"] = "mine"
    use_libtpu()
    library = str(tmp_path / "libtpu" / "libtpu.so")
    assert [os.environ[name] for name in VARIABLES] == ["true", library, "mine"]


def test_nothing_is_set_where_it_is_not_installed() -> None:
    pytest.importorskip("tensorflow_addons", reason="the TPU environment has libtpu")
    use_libtpu()
    assert not set(VARIABLES) & set(os.environ)
