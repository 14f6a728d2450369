"""pipeline.machine: what a result was made with."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from pipeline import machine


def test_versions_are_those_that_run_here() -> None:
    found = machine.versions()
    assert found["python"] == platform.python_version()
    assert (found["numpy"], found["tensorflow"]) == (np.__version__, tf.__version__)
    assert "not installed" not in found.values()


def test_a_package_that_is_absent_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Beam is in the trainer's image."""
    monkeypatch.setattr(machine, "_VERSIONED", ("numpy", "no-such-package"))
    assert machine.versions()["no-such-package"] == "not installed"


def test_the_processor_is_the_kernels_name_for_it() -> None:
    name = machine.processor()
    assert name
    if "model name" in (text := Path("/proc/cpuinfo").read_text()):
        assert f": {name}\n" in text
