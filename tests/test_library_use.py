"""The packages in a user's own script: importing them changes nothing, and a setting of the user's stays."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LEVEL = "TF_CPP_MIN_LOG_LEVEL"


def run_script(text: str, level: str | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a script in a process without (or with) the user's own setting of TensorFlow's log level."""
    environment = {name: value for name, value in os.environ.items() if name != LEVEL}
    if level is not None:
        environment[LEVEL] = level
    return subprocess.run(
        [sys.executable, "-c", text], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )


IMPORT = """
import logging, os, sys
before = dict(os.environ), logging.root.level, list(logging.root.handlers), sys.excepthook, sys.stderr
import {package}
assert before == (dict(os.environ), logging.root.level, list(logging.root.handlers), sys.excepthook, sys.stderr)
assert not logging.root.manager.loggerDict.keys()
print(sorted(name for name in sys.modules if name.split(".")[0] in ("tensorflow", "numpy", "apache_beam", "keras")))
"""


@pytest.mark.parametrize("package", ["pipeline", "trainer"])
def test_importing_a_package_costs_no_tensorflow_and_changes_nothing(package: str) -> None:
    done = run_script(IMPORT.format(package=package))
    assert (done.stdout, done.stderr) == ("[]\n", "")


STARTS = """
import os
from pipeline.cli.logs import show_warnings
show_warnings()
import tensorflow as tf
tf.constant(1) + 1
print(os.environ["TF_CPP_MIN_LOG_LEVEL"])
"""


def test_a_command_starts_without_notices_of_tensorflow() -> None:
    """In a script of one's own, TensorFlow prints what it prints: its log level is the user's to set."""
    done = run_script(STARTS)
    assert (done.stdout, done.stderr) == ("3\n", "")


def test_a_log_level_of_the_users_stays() -> None:
    assert run_script(STARTS, "0").stdout == "0\n"


NAMES = """
import {package}, sys
assert set({package}.__all__) <= set(dir({package}))
from {package} import *
print(sorted(getattr({package}, name).__name__ for name in {package}.__all__))
assert "tensorflow" in sys.modules and "apache_beam" not in sys.modules and "matplotlib" not in sys.modules
try:
    {package}.nothing
except AttributeError as error:
    assert "nothing" in str(error)
"""
PUBLIC = {
    "pipeline": [
        "DataError",
        "Inception",
        "Light",
        "Store",
        "Teacher",
        "UserError",
        "View",
        "ViewPolicy",
        "open_store",
        "sample_views",
    ],
    "trainer": ["DistillationLoss", "Distiller", "build_student"],
}


@pytest.mark.parametrize("package", PUBLIC)
def test_public_names_are_imported_when_they_are_used(package: str) -> None:
    assert run_script(NAMES.format(package=package), "3").stdout == f"{PUBLIC[package]}\n"
    assert (ROOT / package / "py.typed").is_file()
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "py.typed" in settings["package-data"][package]
