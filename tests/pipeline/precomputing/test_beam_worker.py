"""pipeline.precomputing.beam_worker: Beam's worker process with less output."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.precomputing.beam_worker import StandardError

ROOT = Path(__file__).resolve().parents[3]
TOLD = "Traceback (most recent call last):\n  ...\npipeline.errors.DataError: view 7: differs\n\nDuring ..."
DEFECT = "Traceback (most recent call last):\n  ...\nZeroDivisionError: division by zero\n"


@pytest.mark.parametrize(
    ("text", "kept"), [(TOLD, False), (DEFECT, True), ("a DataError: in a line\n", True)]
)
def test_only_tracebacks_of_reported_errors_are_dropped(text: str, kept: bool) -> None:
    stream = io.StringIO()
    print(text, file=StandardError(stream))
    assert stream.getvalue() == (f"{text}\n" if kept else "\n")


def test_other_attributes_are_those_of_the_stream() -> None:
    wrapped = StandardError(sys.__stderr__)
    assert wrapped.fileno() == sys.__stderr__.fileno()
    assert wrapped.encoding == sys.__stderr__.encoding


@pytest.mark.usefixtures("beam")
def test_a_worker_without_a_runner_prints_only_its_error() -> None:
    """Errors of Beam's own command are not hidden."""
    environment = {k: v for k, v in os.environ.items() if "API_SERVICE_DESCRIPTOR" not in k}
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.precomputing.beam_worker"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "KeyError: 'CONTROL_API_SERVICE_DESCRIPTOR'"
    assert "INFO" not in done.stderr
    assert "apitools" not in done.stderr


@pytest.mark.usefixtures("beam")
def test_an_interrupt_ends_it_without_output() -> None:
    """It waits for a control channel to a closed port."""
    environment = {**os.environ, "CONTROL_API_SERVICE_DESCRIPTOR": "url: 'localhost:1'"}
    with subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "pipeline.precomputing.beam_worker"],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "apache_beam" in line:
                break
        process.send_signal(signal.SIGINT)
        rest = [line for line in process.stderr.read().splitlines() if not line.startswith("import time:")]
    assert rest == []
    assert process.returncode == 0
