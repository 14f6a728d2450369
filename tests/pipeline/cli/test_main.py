"""pipeline.cli.main: errors are reported on one line, with an exit code; defects keep their tracebacks."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tensorflow as tf

from pipeline.cli.main import DEBUG_VARIABLE, run_command
from pipeline.errors import DataError, TryAgainError, UserError
from pipeline.errors.causes import find_error

ROOT = Path(__file__).resolve().parents[3]
MESSAGE = "view 7 (example 3): crop fingerprint is 00c0ffee here, 0badf00d in the store [1 of 4]; stop"


class OwnCodeError(DataError):
    """An error with an exit code and an attribute of its own."""

    def __init__(self, message: str, *, exit_code: int = 3, shard: str = "") -> None:
        super().__init__(message)
        self.exit_code, self.shard = exit_code, shard


def test_an_error_keeps_its_type_its_code_and_its_attributes(capsys: pytest.CaptureFixture[str]) -> None:
    original = OwnCodeError(MESSAGE, exit_code=137, shard="views-7")
    outer = RuntimeError("outer")
    outer.__cause__ = original
    assert find_error(outer) is original
    # As Beam raises it again in this process: another object of the type, with a longer message.
    again = OwnCodeError(f"{MESSAGE} [while running 'ComputeShard']")
    again.__context__ = original
    assert find_error(again) is original

    def main(argv: list[str]) -> None:
        raise again from original

    assert code_of(main) == 137
    assert capsys.readouterr().err == f"error: {MESSAGE}\n"
    # All that is left between processes is text.
    assert type(find_error(RuntimeError(f"tests.OwnCodeError: {MESSAGE}\n"))) is OwnCodeError


def code_of(main: object, argv: list[str] | None = None) -> int:
    with pytest.raises(SystemExit) as caught:
        run_command(main, argv or [])  # type: ignore[arg-type]
    return caught.value.code


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (3, 3)])
def test_a_command_ends_with_what_main_returns(returned: int | None, code: int) -> None:
    assert code_of(lambda argv: returned) == code


def test_a_command_gets_its_arguments() -> None:
    got: list[str] = []
    assert code_of(got.extend, ["--a", "b"]) == 0
    assert got == ["--a", "b"]


@pytest.mark.parametrize(("kind", "code"), [(UserError, 2), (DataError, 3), (TryAgainError, 75)])
def test_an_error_is_one_line_and_its_exit_code(
    kind: type[Exception], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(argv: list[str]) -> None:
        try:
            raise kind(MESSAGE)
        except kind as error:
            raise RuntimeError("a long\nmessage of\na library") from error

    assert code_of(main) == code
    assert capsys.readouterr().err == f"error: {MESSAGE}\n"


def test_an_interrupt_exits_130_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def main(argv: list[str]) -> None:
        raise KeyboardInterrupt

    assert code_of(main) == 130
    assert len(capsys.readouterr().err.splitlines()) == 1


FULL = "No space left on device; "
TENSORFLOWS = "{{function_node __wrapped__SaveV2_device_/job:localhost}} the/store a; No space left on device [Op:SaveV2]"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "the/store a"), f"the/store a: {FULL}"),
        (OSError(errno.ENOSPC, "No space left on device"), FULL),
        (
            OSError(errno.ENOSPC, "No space left on device", "from", None, "the/store a"),
            f"the/store a: {FULL}",
        ),
        (
            OSError(errno.EROFS, "Read-only file system", "a"),
            "a: Read-only file system; ",
        ),
        (
            OSError(errno.EMFILE, "Too many open files", "a"),
            "a: Too many open files; ",
        ),
        (
            OSError(errno.EBUSY, "Device or resource busy", "a"),
            "a: Device or resource busy; ",
        ),
        (tf.errors.ResourceExhaustedError(None, None, TENSORFLOWS), f"the/store a: {FULL}"),
        (
            tf.errors.PermissionDeniedError(None, None, "the/store a; Permission denied"),
            "the/store a: Permission denied; ",
        ),
        (
            RuntimeError("write() failed: No space left on device; writing the/store a; at byte 4096"),
            f"the/store a: {FULL}",
        ),
        (
            # As it remains from another process of Beam.
            RuntimeError(
                "Traceback\nOSError: [Errno 28] No space left on device: 'the/store a' [while running 'a']"
            ),
            f"the/store a: {FULL}",
        ),
        (
            RuntimeError(f"tensorflow.python.framework.errors_impl.ResourceExhaustedError: {TENSORFLOWS}\n"),
            f"the/store a: {FULL}",
        ),
    ],
)
def test_a_system_error_is_one_line_with_its_path(
    error: Exception, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(argv: list[str]) -> None:
        raise RuntimeError("a message of\na library") from error

    assert code_of(main) == 2
    (printed,) = capsys.readouterr().err.splitlines()
    assert printed.startswith(f"error: {line}")


@pytest.mark.parametrize("how", ["flag", "environment"])
def test_debug_shows_the_traceback(
    how: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DEBUG_VARIABLE, "1" if how == "environment" else "0")

    def main(argv: list[str]) -> None:
        try:
            {}["a"]
        except KeyError as error:
            raise UserError(MESSAGE) from error

    assert code_of(main, ["--debug"] if how == "flag" else []) == 2
    *lines, last = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback ")
    assert {"KeyError: 'a'", f"pipeline.errors.UserError: {MESSAGE}"} < {*lines}
    assert last == f"error: {MESSAGE}"
    assert os.environ[DEBUG_VARIABLE] == "1"  # child processes do the same


def test_a_broken_pipe_of_our_own_is_a_defect() -> None:
    code = (
        "from pipeline.cli.main import run_command\n"
        "def main(argv):\n"
        "    raise BrokenPipeError(32, 'Broken pipe')\n"
        "run_command(main)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "BrokenPipeError" in done.stderr


def test_a_defect_of_ours_keeps_its_traceback() -> None:
    def main(argv: list[str]) -> None:
        raise AssertionError("a defect")

    with pytest.raises(AssertionError, match="a defect"):
        run_command(main, [])


def test_a_closed_standard_output_ends_the_command_silently() -> None:
    code = (
        "from pipeline.cli.main import run_command\n"
        "run_command(lambda argv: [print('x' * 99) for _ in range(10000)] and None)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


def modules() -> dict[str, str]:
    """The text of every module by its name."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text()
        for package in ("pipeline", "trainer")
        for path in (ROOT / package).rglob("*.py")
    }


COMMANDS = sorted(name for name, text in modules().items() if "\ndef main(argv" in text)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_run_with_its_imports(command: str) -> None:
    before, guard, after = modules()[command].partition('\nif __name__ == "__main__":')
    assert guard
    assert re.findall(r'run_module\("([\w.]+)"', after) == [command]
    assert re.findall(r"^(?:from|import) .*", before, re.MULTILINE) == ["from __future__ import annotations"]


def test_a_failed_command_ends_whatever_its_threads_do(tmp_path: Path) -> None:
    """Such as threads of tf.data, which a failed training run leaves behind. Temporary directories are still removed."""
    (tmp_path / "failing.py").write_text(
        "import tempfile, threading\n"
        "from pathlib import Path\n"
        "from pipeline.errors import DataError\n"
        "def main(argv):\n"
        "    global scratch\n"
        "    scratch = tempfile.TemporaryDirectory(dir=argv[0])\n"
        "    threading.Thread(target=threading.Event().wait).start()\n"
        "    raise DataError('two sides differ')\n"
    )
    (tmp_path / "scratch").mkdir()
    code = "from pipeline.cli.main import run_module; run_module('failing')"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "scratch")],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 3
    assert "two sides differ" in done.stderr
    assert not list((tmp_path / "scratch").iterdir())
