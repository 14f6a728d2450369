"""pipeline.cli.logs: warnings and errors of libraries are shown, known meaningless ones are not."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from pipeline.cli.logs import show_warnings
from pipeline.errors import DataError, UserError

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def shown() -> Iterator[None]:
    """Calls `show_warnings`, and undoes it afterwards."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    show_warnings()
    root.setLevel(logging.INFO)  # as Beam's workers do
    yield
    root.handlers[:] = before
    root.setLevel(level)
    threading.excepthook = threading.__excepthook__


def test_warnings_and_errors_are_shown_and_info_is_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logger = logging.getLogger("apache_beam.somewhere")
    logger.info("channel established")
    logger.warning("disk %s is slow", "a")
    logger.error("disk b is gone")
    assert capsys.readouterr().err.splitlines() == [
        "WARNING: apache_beam.somewhere: disk a is slow",
        "ERROR: apache_beam.somewhere: disk b is gone",
    ]


@pytest.mark.parametrize(
    ("logger", "message"),
    [
        ("root", "apitools not found, and bigquery client libraries are not available despite ..."),
        ("__main__", "No semi_persistent_directory found: %s"),
        ("apache_beam.runners.portability.local_job_service", "Worker: %s"),
        ("apache_beam.runners.worker.sdk_worker", "Error processing instruction %s."),
        ("gcsfs", "_request non-retriable exception: Anonymous caller, 401"),
        ("gcsfs", "_get_file_request out of retries on exception: 503"),
    ],
)
def test_known_messages_are_hidden_only_from_their_logger(
    capsys: pytest.CaptureFixture[str], logger: str, message: str
) -> None:
    logging.getLogger(None if logger == "root" else logger).warning(message)
    assert capsys.readouterr().err == ""
    logging.getLogger("another").warning(message)
    logging.getLogger(None if logger == "root" else logger).warning("something else")
    assert len(capsys.readouterr().err.splitlines()) == 2


@pytest.mark.parametrize(
    "error", [UserError("u"), DataError("d"), OSError(28, "No space left on device", "path")]
)
def test_errors_that_the_command_reports_are_not_logged(
    capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    try:
        raise RuntimeError("[while running 'ComputeShard']") from error
    except RuntimeError:
        logging.getLogger("apache_beam.runners.common").exception("it failed")
    assert capsys.readouterr().err == ""


def test_errors_that_follow_ctrl_c_are_not_logged(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise RuntimeError("a channel was closed")  # noqa: B904 - as Beam does, while it closes its channels
    except RuntimeError:
        logging.getLogger("apache_beam.runners").exception("it failed")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("error", "seen"), [(grpc.RpcError(), False), (RuntimeError("a defect"), True)])
def test_an_exception_in_a_thread_is_printed_except_for_a_lost_worker(
    capsys: pytest.CaptureFixture[str], error: Exception, seen: bool
) -> None:
    def fail() -> None:
        raise error

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    assert ("Traceback" in capsys.readouterr().err) == seen
    logging.getLogger("apache_beam.runners").error("it failed", exc_info=error)
    assert ("it failed" in capsys.readouterr().err) == seen


def test_a_defect_is_logged_with_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise ZeroDivisionError("a defect")
    except ZeroDivisionError:
        logging.getLogger("apache_beam.runners.common").exception("it failed")
    err = capsys.readouterr().err
    assert err.startswith("ERROR: apache_beam.runners.common: it failed\nTraceback")
    assert err.endswith("ZeroDivisionError: a defect\n")


@pytest.mark.usefixtures("beam")
def test_the_import_of_beam_logs_nothing() -> None:
    code = "from pipeline.cli.logs import show_warnings; show_warnings(); import apache_beam, logging; logging.warning('x')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == "WARNING: root: x\n"


def test_a_command_whose_standard_error_is_closed_ends_its_work(tmp_path: Path) -> None:
    """As with `command 2>&1 >/dev/null | head`. A progress bar that failed kept tqdm's lock and stopped the next one."""
    (tmp_path / "bars.py").write_text(
        "import sys\nfrom pathlib import Path\nfrom tqdm import tqdm\n"
        "def main(argv):\n"
        "    sys.stdin.readline()\n"
        "    for _ in range(2):\n"
        "        with tqdm(range(3)) as bar:\n"
        "            list(bar)\n"
        "    print('a message', file=sys.stderr)\n"
        "    Path(argv[0]).write_text('done')\n"
    )
    code = "from pipeline.cli.main import run_module; run_module('bars')"
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stderr=pipe, text=True, env=environment)
    assert process.stdin is not None
    assert process.stderr is not None
    process.stderr.close()
    process.stdin.write("go\n")
    process.stdin.close()
    assert process.wait(timeout=60) == 0
    assert (tmp_path / "out").read_text() == "done"
