"""pipeline.storage.cache: the cache directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.storage.cache import cache_dir


def test_cache_dir_order_of_precedence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("VIEW_DISTILL_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.setenv("VIEW_DISTILL_CACHE", "")
    assert cache_dir() == tmp_path / "xdg" / "view-distill"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == tmp_path / "home" / ".cache" / "view-distill"
