"""Commands as child processes of a comparison, one after the other or several side by side.

A child is `python -m trainer.run.child_runs MODULE ...`: `python -m MODULE ...`, such as `trainer.train`, which also ends,
with its state saved, when its parent is gone, however that ended. Children are process groups of their own: a Ctrl-C
reaches the parent alone, which hands each of its signals on once.
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
from typing import TypedDict

from tqdm import tqdm

from pipeline.errors import EXIT_DATA_ERROR, EXIT_TRY_AGAIN, EXIT_USER_ERROR, Interrupted, UserError
from pipeline.storage.checked_json import Count, build, parse_json
from pipeline.storage.lock import writer_lock
from trainer.config.run_files import METRICS_FILE
from trainer.run.preemption import EXIT_CODES, detach_closed_outputs, handle_signals

_POLL_SECONDS = 0.2
_ONE_LINE = (
    EXIT_USER_ERROR,
    EXIT_DATA_ERROR,
    EXIT_TRY_AGAIN,
)  # a process that ends so has printed one line that says why
_LESS_MEMORY = "use a smaller --parallel or --image_cache_bytes"
_PATIENCE_SECONDS = 120  # for a run that an earlier, killed comparison has left to save itself


class ChildError(UserError):
    """A child process failed; it has the child's own line and exit code.

    Args:
      message: one line.
      exit_code: the child's.
    """

    def __init__(self, message: str, *, exit_code: int = UserError.exit_code) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def exit_code(returncode: int) -> int:
    """The exit code of a child process as a shell reports it: 128 + the number of the signal that ended it."""
    return 128 - returncode if returncode < 0 else returncode


def ended_by_signal(code: int, *, less_memory: str) -> str | None:
    """Says which signal ended a process and what helps; None if none did, or one that saves the run.

    Args:
      code: exit code, as a shell reports it.
      less_memory: what makes the process use less memory.
    """
    if code in EXIT_CODES.values() or code - 128 not in set(signal.Signals):
        return None
    name = signal.Signals(code - 128).name
    if name == "SIGKILL":
        return (
            f"killed by SIGKILL (exit code {code}), most likely because the machine ran out of memory; {less_memory}, and "
            "run the same command to continue"
        )
    return f"ended by {name} (exit code {code}); run the same command to continue"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A command to be run.

    Attributes:
      name: for the user.
      module: whose `main` it is.
      argv: of the command.
      workdir: of the run; `METRICS_FILE` there says how far it is.
      steps: that the run will have when it is finished.
    """

    name: str
    module: str
    argv: list[str]
    workdir: Path
    steps: int = 0

    @property
    def log(self) -> Path:
        """What the child writes to its screen; beside its directory, which is the run's alone."""
        return self.workdir.with_name(f"{self.workdir.name}.log")


class Child:
    """A started job.

    Attributes:
      job: it.
      process: of the child.
      signalled: whether it was sent a signal.
      first_step: that it starts from.
    """

    def __init__(self, job: Job) -> None:
        self.job, self.signalled = job, False
        self.first_step = latest_step(job.workdir)
        job.log.parent.mkdir(parents=True, exist_ok=True)
        _wait_for_lock(job)
        with job.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "trainer.run.child_runs", job.module, *job.argv],
                stdin=subprocess.PIPE,  # which closes when this process ends, however it does
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,
            )

    def describe(self) -> str:
        """What the bar shows of it."""
        loading = latest_step(self.job.workdir) == self.first_step
        return f"{self.job.name} (loading)" if loading else self.job.name

    def check(self) -> bool:
        """Whether it has finished.

        Raises:
          ChildError: it failed.
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
        self.signalled = True
        self.process.send_signal(number)  # does nothing if the process has ended

    def end(self, number: int = signal.SIGTERM) -> None:
        """Tells it to save and end, if nobody has and it has not, and waits until it has."""
        if not self.signalled:
            self.send(number)
        self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()


def _wait_for_lock(job: Job) -> None:
    """Until nobody is writing the run's directory: a child whose parent was killed saves, and needs a moment.

    Raises:
      UserError: somebody is still writing it.
    """
    deadline = time.monotonic() + _PATIENCE_SECONDS
    told = False
    while job.workdir.is_dir():
        try:
            with writer_lock(job.workdir, flag="--workdir"):
                return
        except UserError as error:
            if not isinstance(error.__cause__, BlockingIOError) or time.monotonic() > deadline:
                raise  # it cannot be written at all, or the writer does not end
            if not told:
                print(f"{job.name}: waiting for the process that is still writing it", flush=True)
            told = True
            time.sleep(_POLL_SECONDS)


class _Step(TypedDict):
    """A line of any command's progress."""

    step: Count


def latest_step(workdir: Path) -> int:
    """The step of the last whole line of a run's metrics.jsonl; 0 where there is none."""
    path = workdir / METRICS_FILE
    with contextlib.suppress(OSError), path.open("rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - 4096, 0))
        for line in reversed(file.read().splitlines(keepends=True)):
            with contextlib.suppress(ValueError):
                if line.endswith(b"\n"):
                    return build(_Step, parse_json(line.decode()))["step"]
    return 0


class _Signals(contextlib.AbstractContextManager["_Signals"]):
    """Within the context, signals are noted and handed on to the children, each of them once."""

    def __init__(self, running: list[Child]) -> None:
        self._running = running
        self.first: signal.Signals | None = None

    def __enter__(self) -> _Signals:
        self._before = handle_signals(self._hand_on)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.first = self.first or signal.Signals(number)
        for child in self._running:
            child.send(number)
        if number == signal.SIGHUP:
            detach_closed_outputs()


def run_jobs(
    jobs: Sequence[Job], *, parallel: int, on_finished: Callable[[Job], None], unit: str = " steps"
) -> None:
    """Does the jobs in their order, up to `parallel` at a time; a bar shows their steps.

    Args:
      jobs: not yet done, perhaps begun.
      parallel: children at a time, 1 or more.
      on_finished: called after each.
      unit: of the bar.

    Raises:
      ChildError: one failed; the others are told to save and end first.
      Interrupted: a signal came; all have saved.
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
                begun = [child.job for child in running] + waiting
                bar.update(done + sum(min(latest_step(job.workdir), job.steps) for job in begun) - bar.n)
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
    begun = sum(min(latest_step(job.workdir), job.steps) for job in jobs)
    total = sum(job.steps for job in jobs)
    with tqdm(
        total=total,
        initial=begun,
        unit=unit,
        dynamic_ncols=True,
        mininterval=1.0,
        miniters=0,  # shows the time and what is loading, without a step as well
        disable=not total,
    ) as bar:
        yield bar


def _end_with_parent() -> None:
    """Waits for the end of standard input, which the parent holds open, and then ends this process like SIGTERM."""
    with contextlib.suppress(OSError):
        while os.read(0, 1):
            pass
    os.kill(os.getpid(), signal.SIGTERM)


def main(argv: list[str]) -> int:
    """The child: a module's name, and the arguments of its `main`."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    module, *arguments = argv
    code: int = importlib.import_module(module).main(arguments)
    return code
