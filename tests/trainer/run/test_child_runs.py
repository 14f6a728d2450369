"""trainer.run.child_runs: order, failures, signals and progress of child processes."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import Interrupted, UserError
from pipeline.storage.lock import writer_lock
from tests.runs import ROOT, environment, fail
from trainer.run.child_runs import ChildError, Job, latest_step, run_jobs
from trainer.run.preemption import EXIT_CODES

# A command without TensorFlow.
COMMAND = """
import os, signal, sys, time
from pathlib import Path

from pipeline.errors import DataError, Interrupted, TryAgainError, UserError


def main(argv):
    what, directory = argv[0], Path(argv[1])
    directory.mkdir(parents=True, exist_ok=True)

    def save(number, frame):
        with (directory / "signals").open("a") as file:
            file.write(f"{number} ")
        raise Interrupted("SIGTERM: saved at step 7; run the same command", exit_code=128 + number)

    signal.signal(signal.SIGTERM, save)
    signal.signal(signal.SIGINT, save)
    signal.signal(signal.SIGHUP, save)
    (directory / "pid").write_text(str(os.getpid()))
    if what == "fail":
        raise UserError("--flag=x: got x, expected y")
    if what == "corrupt":
        raise DataError("view 7: 1 here, 2 there")
    if what == "later":
        raise TryAgainError("no answer")
    if what == "defect":
        print("error: of a library, which went on", flush=True)
        raise RuntimeError("a defect")
    if what in ("SIGKILL", "SIGSEGV"):
        os.kill(os.getpid(), signal.Signals[what])
    if what == "count":
        time.sleep(1.5)
        (directory / "metrics.jsonl").write_text('{"step": 1}\\n')
        time.sleep(1)
    if what == "wait":
        time.sleep(60)
    (directory / "done").touch()
    return 0
"""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Job]:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "job_command.py").write_text(COMMAND)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{tmp_path / 'modules'}")

    def make(what: str, name: str = "run") -> Job:
        workdir = tmp_path / name
        return Job(name=name, module="job_command", argv=[what, str(workdir)], workdir=workdir)

    return make


def run(*jobs: Job, parallel: int = 1) -> list[str]:
    """Names of the jobs in the order in which they finished."""
    finished: list[str] = []
    run_jobs(jobs, parallel=parallel, on_finished=lambda job: finished.append(job.name))
    return finished


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists() or not path.read_text():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.02)


def test_jobs_run_in_order(job: Callable[..., Job]):
    jobs = [job("do", name) for name in ("b", "a")]
    assert run(*jobs) == ["b", "a"]
    assert all((each.workdir / "done").exists() for each in jobs)


def test_failing_job_ends_all_jobs_with_its_message_and_exit_code(job: Callable[..., Job]):
    waiting, failing, never = job("wait", "waiting"), job("fail", "failing"), job("do", "never")
    with pytest.raises(ChildError, match=r"^failing: --flag=x: got x, expected y$") as failed:
        run(waiting, failing, never, parallel=2)
    assert failed.value.exit_code == 2
    assert not never.workdir.exists()
    if (waiting.workdir / "pid").exists():  # otherwise it ended before its start
        assert not Path("/proc", (waiting.workdir / "pid").read_text()).exists()


def test_defect_of_a_job_shows_its_traceback(job: Callable[..., Job], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(ChildError, match="exit code 1") as failed:
        run(job("defect"))
    assert failed.value.exit_code == 1
    assert "RuntimeError: a defect" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("what", "code", "words"),
    [
        ("fail", 2, ["--flag=x: got x, expected y"]),
        ("corrupt", 3, ["view 7: 1 here, 2 there"]),
        ("later", 75, ["no answer"]),
        ("SIGKILL", 137, ["SIGKILL", "memory", "--parallel", "--image_cache_bytes", "run.log"]),
        ("SIGSEGV", 139, ["SIGSEGV", "run.log"]),
    ],
)
def test_command_ends_with_the_exit_code_of_the_job_that_failed(
    what: str, code: int, words: list[str], job: Callable[..., Job], capsys: pytest.CaptureFixture[str]
):
    def main(argv: list[str]) -> None:
        run(job(what))

    got, line = fail([], capsys, main=main)
    assert got == code
    assert line.startswith("error: run: ")
    for word in words:
        assert word in line
    assert ("memory" in line) == (what == "SIGKILL")


@pytest.mark.parametrize("number", list(EXIT_CODES), ids=lambda number: number.name)
def test_signal_is_forwarded_once_and_all_children_end(job: Callable[..., Job], number: signal.Signals):
    waiting = job("wait")

    def interrupt() -> None:
        wait_for(waiting.workdir / "pid")
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(Interrupted, match=number.name) as stopped:
        run(waiting, job("do", "never"))
    thread.join()
    assert stopped.value.exit_code == 128 + number
    assert (waiting.workdir / "signals").read_text().split() == [str(int(number))]


def test_child_of_a_killed_parent_saves_and_ends(job: Callable[..., Job]):
    waiting = job("wait")
    code = (
        "from pathlib import Path; from trainer.run.child_runs import Job, run_jobs; "
        f"run_jobs([Job(name='a', module='job_command', argv={waiting.argv!r}, workdir=Path({str(waiting.workdir)!r}))], "
        "parallel=1, on_finished=print)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment())
    wait_for(waiting.workdir / "pid")
    parent.kill()
    parent.wait()
    wait_for(waiting.workdir / "signals")
    assert (waiting.workdir / "signals").read_text().split() == [str(int(signal.SIGTERM))]


def test_locked_directory_is_waited_for(job: Callable[..., Job], capsys: pytest.CaptureFixture[str]):
    later, held = job("do"), threading.Event()
    later.workdir.mkdir()

    def write() -> None:
        with writer_lock(later.workdir):
            held.set()
            time.sleep(2)  # a writer waits a second without a message

    writer = threading.Thread(target=write)
    writer.start()
    held.wait()
    assert run(later) == ["run"]
    writer.join()
    assert "run: waiting" in capsys.readouterr().out


def test_progress_bar_shows_loading_jobs_and_steps(
    job: Callable[..., Job], capsys: pytest.CaptureFixture[str]
):
    counted = dataclasses.replace(job("count"), steps=2)
    run_jobs([counted], parallel=1, on_finished=lambda _: None, unit=" turns")
    shown = capsys.readouterr().err
    assert "run (loading)" in shown
    assert "2/2" in shown
    assert "turns" in shown


def test_directory_that_cannot_be_written_is_not_waited_for(job: Callable[..., Job]):
    blocked = job("do")
    (blocked.workdir / ".lock").mkdir(parents=True)
    begun = time.monotonic()
    with pytest.raises(UserError, match="--workdir"):
        run(blocked)
    assert time.monotonic() - begun < 5


def test_latest_step_is_that_of_the_last_complete_line(tmp_path: Path):
    assert latest_step(tmp_path) == 0
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "kind": "train"}\n{"step": 40, "ki')
    assert latest_step(tmp_path) == 3
