"""Runs commands as child processes of a comparison, one at a time or in parallel.

A child is `python -m trainer.run.child_runs MODULE ...`. It does the same as `python -m MODULE ...`, such as `trainer.train`,
and also saves and ends when its parent is gone for any reason. Each child has its own process group, so that a Ctrl-C reaches
only the parent, which forwards each signal once.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take seconds
    from pipeline.cli.main import run_module

    run_module("trainer.run.child_runs")

import contextlib
import dataclasses
import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

from tqdm import tqdm

from pipeline.errors import EXIT_DATA_ERROR, EXIT_TRY_AGAIN, EXIT_USER_ERROR, Interrupted, UserError
from pipeline.storage.lock import LockedError, writer_lock
from trainer.config.run_files import METRICS_FILE, parse_step
from trainer.run.preemption import EXIT_CODES, detach_closed_outputs, handle_signals

_POLL_SECONDS = 0.2
# With these exit codes, a process has printed its error in one line.
_ONE_LINE = (EXIT_USER_ERROR, EXIT_DATA_ERROR, EXIT_TRY_AGAIN)
_LESS_MEMORY = "use a smaller --parallel or --image_cache_bytes"
_PATIENCE_SECONDS = 120  # for a child of an earlier, killed comparison to save and end


class ChildError(UserError):
    """A child process failed."""

    def __init__(self, message: str, *, exit_code: int = UserError.exit_code) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def exit_code(returncode: int) -> int:
    """The exit code of a child process as a shell reports it: 128 plus the number of the signal that ended it."""
    return 128 - returncode if returncode < 0 else returncode


def ended_by_signal(code: int, *, less_memory: str) -> str | None:
    """Describes the signal that ended a process; None if there was none, or one that saves the run.

    Args:
      code: exit code, as a shell reports it.
      less_memory: how to make the process use less memory.
    """
    if code in EXIT_CODES.values() or code - 128 not in set(signal.Signals):
        return None
    name = signal.Signals(code - 128).name
    if name == "SIGKILL":
        return (
            f"killed by SIGKILL (exit code {code}), most likely because the machine ran out of memory; {less_memory}, and run "
            "the same command to continue"
        )
    return f"ended by {name} (exit code {code}); run the same command to continue"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A command to run.

    Attributes:
      module: module with the command's `main`.
      workdir: directory of the run; its metrics.jsonl shows the progress.
    """

    name: str
    module: str
    argv: list[str]
    workdir: Path
    steps: int = 0

    @property
    def log(self) -> Path:
        """File with the child's output, next to the directory of the run."""
        return self.workdir.with_name(f"{self.workdir.name}.log")


class Child:
    """A started job."""

    def __init__(self, job: Job) -> None:
        self.job, self.signaled = job, False
        self.first_step = latest_step(job.workdir)
        job.log.parent.mkdir(parents=True, exist_ok=True)
        _wait_for_lock(job)
        with job.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "trainer.run.child_runs", job.module, *job.argv],
                stdin=subprocess.PIPE,  # closes when this process ends for any reason
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,
            )

    def describe(self) -> str:
        """Text for the progress bar."""
        loading = latest_step(self.job.workdir) == self.first_step
        return f"{self.job.name} (loading)" if loading else self.job.name

    def check(self) -> bool:
        """Returns whether the child has finished.

        Raises:
          ChildError: the child failed.
        """
        code = self.process.poll()
        if not code:
            return code == 0
        raise self._failure(exit_code(code))

    def _failure(self, code: int) -> ChildError:
        lines = self.job.log.read_text(errors="replace").splitlines()
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        if (killed := ended_by_signal(code, less_memory=_LESS_MEMORY)) is not None:
            reason = f"{killed} (its output: {self.job.log})"
        elif code in EXIT_CODES.values():
            reason = lines[-1] if lines else "interrupted"
        elif code in _ONE_LINE and errors:
            reason = errors[-1]
        else:
            print("\n".join(lines[-30:]), file=sys.stderr)
            reason = f"exit code {code} (its output: {self.job.log})"
        return ChildError(f"{self.job.name}: {reason}", exit_code=code)

    def send(self, number: int) -> None:
        """Sends a signal."""
        self.signaled = True
        self.process.send_signal(number)  # has no effect if the process has ended

    def end(self, number: int = signal.SIGTERM) -> None:
        """Sends a signal to save and end, unless one was sent, and waits for the end."""
        if not self.signaled:
            self.send(number)
        self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()


def _wait_for_lock(job: Job) -> None:
    """Waits for the lock of the run's directory: a child whose parent was killed needs time to save.

    Raises:
      UserError: another process still holds the lock.
    """
    deadline = time.monotonic() + _PATIENCE_SECONDS
    announced = False
    while job.workdir.is_dir():
        try:
            with writer_lock(job.workdir, flag="--workdir"):
                return
        except LockedError:
            if time.monotonic() > deadline:
                raise
            if not announced:
                print(f"{job.name}: waiting for another process that is writing it", flush=True)
            announced = True
            time.sleep(_POLL_SECONDS)


def latest_step(workdir: Path) -> int:
    """Step of the last complete line of a run's metrics.jsonl; 0 if there is none."""
    path = workdir / METRICS_FILE
    with contextlib.suppress(OSError), path.open("rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - 4096, 0))
        for line in reversed(file.read().splitlines(keepends=True)):
            with contextlib.suppress(ValueError):
                if line.endswith(b"\n"):
                    return parse_step(line.decode())["step"]
    return 0


class _Signals(contextlib.AbstractContextManager["_Signals"]):
    """Context that records signals and forwards each to the children once."""

    def __init__(self, running: list[Child]) -> None:
        self._running = running
        self.first: signal.Signals | None = None

    def __enter__(self) -> _Signals:
        self._before = handle_signals(self._forward)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.first = self.first or signal.Signals(number)
        for child in self._running:
            child.send(number)
        if number == signal.SIGHUP:
            detach_closed_outputs()


def run_jobs(
    jobs: Sequence[Job], *, parallel: int, on_finished: Callable[[Job], None], unit: str = " steps"
) -> None:
    """Runs jobs in order, up to `parallel` at a time, with a progress bar.

    Args:
      jobs: unfinished jobs, which continue from their checkpoints.
      parallel: maximum number of children at a time, 1 or more.

    Raises:
      ChildError: a child failed; the others have saved and ended.
      Interrupted: a signal came; all children have saved.
    """
    waiting, running = list(jobs), list[Child]()
    done = 0
    with _Signals(running) as signals, _bar(jobs, unit) as bar:
        try:
            while (waiting or running) and signals.first is None:
                while waiting and len(running) < parallel:
                    running.append(Child(waiting.pop(0)))
                time.sleep(_POLL_SECONDS)
                for child in list(running):
                    if signals.first is None and child.check():
                        child.end()
                        running.remove(child)
                        done += child.job.steps
                        on_finished(child.job)
                bar.set_description(", ".join(child.describe() for child in running), refresh=False)
                unfinished = [child.job for child in running] + waiting
                bar.update(done + sum(min(latest_step(job.workdir), job.steps) for job in unfinished) - bar.n)
        finally:
            for child in running:
                child.end(signals.first or signal.SIGTERM)
    if signals.first is not None:
        raise Interrupted(
            f"{signals.first.name}: the runs have saved; run the same command to continue",
            exit_code=128 + signals.first,
        )


@contextlib.contextmanager
def _bar(jobs: Sequence[Job], unit: str) -> Iterator[tqdm]:
    initial = sum(min(latest_step(job.workdir), job.steps) for job in jobs)
    total = sum(job.steps for job in jobs)
    with tqdm(
        total=total,
        initial=initial,
        unit=unit,
        dynamic_ncols=True,
        mininterval=1.0,
        miniters=0,  # refresh without steps, to show the time and the job that is loading
        disable=not total,
    ) as bar:
        yield bar


def _end_with_parent() -> None:
    """Sends SIGTERM to this process when its standard input closes, which the parent holds open."""
    with contextlib.suppress(OSError):
        while os.read(0, 1):
            pass
    os.kill(os.getpid(), signal.SIGTERM)


def main(argv: list[str]) -> int:
    """Runs the child; the arguments are a module's name and the arguments of its `main`."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    module, *arguments = argv
    code: int = importlib.import_module(module).main(arguments)
    return code
