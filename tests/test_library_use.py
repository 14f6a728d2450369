"""The packages in a user's own script: TensorFlow starts without its notices, and a setting of the user's stays."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LEVEL = "TF_CPP_MIN_LOG_LEVEL"


def run_script(text: str, level: str | None) -> subprocess.CompletedProcess[str]:
    """Runs a script in a process without (or with) the user's own setting of TensorFlow's log level."""
    environment = {name: value for name, value in os.environ.items() if name != LEVEL}
    if level is not None:
        environment[LEVEL] = level
    return subprocess.run(
        [sys.executable, "-c", text], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )


@pytest.mark.parametrize(
    "first", ["from pipeline.store.reader import Store", "from trainer.targets import replay"]
)
def test_a_script_that_imports_a_package_first_gets_no_notices(first: str) -> None:
    done = run_script(f"{first}\nimport tensorflow as tf\ntf.constant(1) + 1", None)
    assert done.stderr == ""


@pytest.mark.parametrize("package", ["pipeline", "trainer"])
def test_a_log_level_of_the_users_stays(package: str) -> None:
    done = run_script(f"import os, {package}\nprint(os.environ['{LEVEL}'])", "0")
    assert done.stdout == "0\n"
