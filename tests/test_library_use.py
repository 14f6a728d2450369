"""The packages in a user's own script: importing them changes nothing, and a setting of the user's stays."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tensorflow as tf

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


@pytest.mark.skipif(tf.__version__ < "2.16", reason="TensorFlow 2.15 has Keras 2")
def test_keras_3_is_refused_by_the_variable_that_chooses_keras_2() -> None:
    code = (
        "import os; del os.environ['TF_USE_LEGACY_KERAS']\n"
        "from pipeline import UserError\n"
        "try:\n    from trainer import Distiller\n"
        "except UserError as error:\n    print(error)\n"
    )
    assert "TF_USE_LEGACY_KERAS=1" in run_script(code).stdout


@pytest.mark.skipif(tf.__version__ >= "2.16", reason="needs TensorFlow 2.15")
def test_inherited_variable_of_later_versions_does_not_break_a_command() -> None:
    code = "from pipeline.cli.environment import use_keras_2 as use; use(); import tensorflow as tf; print(tf.keras.layers.Dense)"
    environment = {**os.environ, "TF_USE_LEGACY_KERAS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert "Dense" in done.stdout


STARTS = """
import os
from pipeline.cli.logs import show_warnings
show_warnings()
import tensorflow as tf
tf.constant(1) + 1
print(os.environ["TF_CPP_MIN_LOG_LEVEL"])
"""


@pytest.mark.skipif(
    tf.__version__ >= "2.20", reason="logs before it reads its level (tensorflow issue 100442)"
)
def test_a_command_starts_without_notices_of_tensorflow() -> None:
    """In a script of one's own, TensorFlow prints what it prints: its log level is the user's to set."""
    done = run_script(STARTS)
    assert (done.stdout, done.stderr) == ("3\n", "")


def test_a_log_level_of_the_users_stays() -> None:
    assert run_script(STARTS, "0").stdout == "0\n"


NAMES = """
import sys
import tensorflow as tf
tf.keras.Model
theirs = set(sys.modules)  # tf-keras imports matplotlib
import {package}
assert set({package}.__all__) <= set(dir({package}))
from {package} import *
print(sorted(getattr({package}, name).__name__ for name in {package}.__all__))
assert not (set(sys.modules) - theirs) & {{"apache_beam", "matplotlib"}}
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
