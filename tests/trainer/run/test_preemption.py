"""trainer.run.preemption: SIGTERM, Ctrl-C and SIGHUP save, exit with 143, 130 and 129, and the same command continues."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli.main import run_command
from pipeline.errors import Interrupted
from tests.runs import ROOT, arguments, environment, losses, metrics
from tests.teachers import finetune_arguments
from trainer import teacher, train
from trainer.run.callbacks import MetricsLog
from trainer.run.evaluation import Evaluator
from trainer.run.preemption import EXIT_CODES, Preemption

ALL = pytest.mark.parametrize("number", list(EXIT_CODES), ids=lambda number: number.name)


@ALL
def test_signal_is_recorded_while_there_is_something_to_save(number: signal.Signals):
    before = [signal.getsignal(each) for each in EXIT_CODES]
    with Preemption() as preemption:
        preemption.defer()
        signal.raise_signal(number)
        assert preemption.requested is number
        with pytest.raises(Interrupted, match=f"{number.name}: saved at step 7") as stop:
            preemption.resume("saved at step 7")
    assert stop.value.exit_code == 128 + number
    assert [signal.getsignal(each) for each in EXIT_CODES] == before


@ALL
def test_signal_ends_the_run_at_once_while_there_is_nothing_to_save(number: signal.Signals):
    with Preemption() as preemption:
        with pytest.raises(Interrupted, match=number.name):
            signal.raise_signal(number)
        preemption.requested = None
        preemption.defer()
        preemption.resume("saved at step 7")
        with pytest.raises(Interrupted, match="saved at step 7"):
            signal.raise_signal(number)


def test_sighup_stays_ignored_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Preemption() as preemption:
            signal.raise_signal(signal.SIGHUP)
            assert preemption.requested is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# Saves like a run, and prints like its progress bar.
SAVES = """
import sys, time
from pipeline.cli.main import run_command
from trainer.run.preemption import Preemption
def main(argv):
    with Preemption() as preemption:
        preemption.defer()
        print("ready", flush=True)
        while preemption.requested is None:
            time.sleep(0.01)
        print("a bar", file=sys.stderr, flush=True)
        print("a line", flush=True)
        open(argv[0], "w").close()
        preemption.resume("saved")
run_command(main)
"""


def start_saving(path: Path, **streams: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", SAVES, str(path)]
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, **streams)


def test_run_saves_after_its_terminal_closed(tmp_path: Path):
    ours, theirs = os.openpty()

    def own_terminal() -> None:
        fcntl.ioctl(1, termios.TIOCSCTTY, 0)

    with start_saving(
        tmp_path / "saved", stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=own_terminal
    ) as process:
        os.close(theirs)
        assert os.read(ours, 5) == b"ready"
        os.close(ours)  # like sshd when the connection is lost: the kernel sends SIGHUP
        assert process.wait() == 129
    assert (tmp_path / "saved").exists()


def test_run_saves_if_the_reader_of_its_output_gets_the_same_sighup(tmp_path: Path):
    ours, theirs = os.pipe()
    with start_saving(tmp_path / "saved", stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        assert os.read(ours, 5) == b"ready"
        process.send_signal(signal.SIGHUP)
        time.sleep(0.05)
        os.close(ours)  # `... 2>&1 | tee log`, a moment later
        assert process.wait() == 129
    assert (tmp_path / "saved").exists()


def test_after_a_signal_ctrl_c_kills_and_sigterm_is_recorded_again(capfd: pytest.CaptureFixture[str]):
    with Preemption() as preemption:
        preemption.defer()
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    assert "SIGTERM: " in capfd.readouterr().err


def test_interrupt_wrapped_by_tensorflow_ends_with_the_signal_s_code():
    def work() -> None:
        with Preemption():
            try:
                signal.raise_signal(signal.SIGTERM)
            except Interrupted as error:
                raise RuntimeError("UnknownError: Interrupted: SIGTERM") from error

    with pytest.raises(Interrupted) as stop:
        work()
    assert stop.value.exit_code == 143


def test_system_error_is_reported_even_after_a_signal():
    def work() -> None:
        with Preemption() as preemption:
            preemption.defer()
            signal.raise_signal(signal.SIGTERM)
            raise OSError(errno.ENOSPC, "No space left on device", "ckpt-8")

    with pytest.raises(OSError, match="No space left on device"):
        work()


# In a run.

Interrupt = Callable[[type, str, Callable[..., bool], signal.Signals], None]


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Interrupt:
    """Sends a signal to this process once, at the first call of a method for which `when` is true."""

    def patch(owner: type, name: str, when: Callable[..., bool], number: signal.Signals) -> None:
        original, sent = getattr(owner, name), []

        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not sent and when(*args):
                sent.append(number)
                signal.raise_signal(number)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(owner, name, method)

    return patch


def stop(
    main: Callable[[list[str]], int], argv: list[str], capsys: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    """Returns the exit code and the last line on standard error."""
    with pytest.raises(SystemExit) as exit_info:
        run_command(main, argv)
    assert isinstance(exit_info.value.code, int)
    return exit_info.value.code, capsys.readouterr().err.splitlines()[-1]


def test_run_stopped_in_a_step_and_in_an_evaluation_continues(
    published_store: Path,
    data_dir: Path,
    tmp_path: Path,
    interrupt: Interrupt,
    capsys: pytest.CaptureFixture[str],
):
    argv = arguments(published_store, tmp_path, data_dir, "--log_every=1", "--eval_every=3", "--steps=5")
    interrupt(MetricsLog, "write", lambda step, figures: step == 2, signal.SIGINT)
    code, line = stop(train.main, argv, capsys)
    assert (code, line) == (130, "SIGINT: saved at step 2; run the same command to continue")
    interrupt(Evaluator, "evaluate", lambda student: True, signal.SIGTERM)
    code, line = stop(train.main, argv, capsys)
    assert (code, line) == (143, "SIGTERM: saved at step 3; run the same command to continue")
    assert metrics(tmp_path, "eval_test") == []
    assert train.main(argv) == 0
    assert list(losses(tmp_path)) == [1, 2, 3, 4, 5]
    assert [line["step"] for line in metrics(tmp_path, "eval_test")] == [3, 5]


def test_fine_tuning_stops_and_continues(
    colors_dir: Path, tmp_path: Path, interrupt: Interrupt, capsys: pytest.CaptureFixture[str]
):
    argv = finetune_arguments(colors_dir, tmp_path, "--steps=3")
    interrupt(MetricsLog, "write", lambda step, figures: step == 2, signal.SIGHUP)
    code, line = stop(teacher.main, argv, capsys)
    assert (code, line) == (129, "SIGHUP: saved at step 2; run the same command to continue")
    assert not (tmp_path / "teacher").exists()
    assert teacher.main(argv) == 0
    assert list(losses(tmp_path / "run")) == [1, 2, 3]


@pytest.mark.slow
@ALL
def test_process_saves_after_a_signal_and_the_same_command_continues(
    number: signal.Signals, published_store: Path, data_dir: Path, tmp_path: Path
):
    argv = arguments(published_store, tmp_path, data_dir, "--log_every=1", "--eval_every=3")
    command = [sys.executable, "-m", "trainer.train", *argv, "--checkpoint_every=1000"]
    with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        path = tmp_path / "metrics.jsonl"
        while not (path.exists() and '"step": 2' in path.read_text()):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        _, text = process.communicate()
    assert process.returncode == 128 + number, text[-2000:]
    assert f"{number.name}: saved at step" in text.splitlines()[-1]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "continuing at step" in done.stdout
    assert list(losses(tmp_path)) == list(range(1, 11))
    assert [line["step"] for line in metrics(tmp_path, "eval_test")] == [3, 6, 9, 10]
