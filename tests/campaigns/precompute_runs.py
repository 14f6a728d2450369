"""Precomputes for the fault campaign, forked from a process with all imports done, so that kills hit actual work.

The process of the campaign may import TensorFlow but never run it, because a fork does not have its threads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.cli.logs import show_warnings
from pipeline.cli.main import run_command
from pipeline.precompute import main
from pipeline.precomputing import publishing
from pipeline.storage.bucket import BucketDirectory
from pipeline.storage.files import TEMPORARY
from pipeline.storage.lock import LOCK_FILE
from pipeline.store.layout import PENDING
from pipeline.store.metadata import published_lengths
from pipeline.store.reader import EVAL_DIRECTORY
from pipeline.store.shards import parse_shard_name
from pipeline.store.spec import Spec
from tests.stores import shard_files

METADATA = ("manifest.json", "dataset_info.json", "features.json")
STEPS = ("mkdir", "link", "replace", "fsync", "rmdir")  # functions of `os` that publishing uses


class DisturbedError(Exception):
    """A store differs from the expected one, or a run failed in an unexpected way."""


@dataclasses.dataclass(frozen=True)
class State:
    """State of a store after a kill.

    Attributes:
      published: Number of published views.
      finished: Finished shards that are not published.
      half_written: Temporary files of shards and metadata.
      open_session: The spec exists.
    """

    published: int
    finished: list[str]
    half_written: list[str]
    open_session: bool

    @property
    def in_flight(self) -> bool:
        """Whether an unfinished run left anything."""
        return bool(self.finished or self.half_written or (self.open_session and not self.published))

    def __str__(self) -> str:
        half = ", ".join(name.split("-")[1] for name in self.half_written) or "nothing"
        return f"{self.published} views published; {len(self.finished)} shards finished, half-written: {half}"


def state_of(store: Path) -> State:
    """Reads the state of a store without opening a shard."""
    finished, half_written, views = [], [], 0
    for directory in (store, store / EVAL_DIRECTORY):
        if not directory.is_dir():
            continue
        lengths = published_lengths(directory)
        views += sum(map(sum, lengths.values()))
        for path in sorted(directory.iterdir()):
            named = parse_shard_name(path.name)
            if path.name.startswith(TEMPORARY):
                half_written.append(path.name)
            elif named is not None and named[1] >= len(lengths.get(named[0], ())):
                finished.append(path.name)
        half_written += [path.name for path in (directory / PENDING).glob(f"{TEMPORARY}*")]
    return State(views, finished, half_written, (store / "spec.json").exists())


def content_of(store: Path) -> dict[str, Any]:
    """The content that must be equal: bytes of all shards and metadata files, and the spec."""
    names = [f"{directory}{name}" for directory in ("", f"{EVAL_DIRECTORY}/") for name in METADATA]
    files = {name: (store / name).read_bytes() for name in names if (store / name).exists()}
    return {**shard_files(store), **files, "spec": Spec.load(store).identity()}


def check_same(store: Path, expected: dict[str, Any]) -> None:
    """Checks that a finished store is byte-equal to an undisturbed one and has no leftover files.

    Raises:
      DisturbedError: names the files that differ.
    """
    found = content_of(store)
    wrong = [name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)]
    wrong += [
        str(path) for path in store.rglob("*") if path.name == PENDING or path.name.startswith(TEMPORARY)
    ]
    if wrong:
        raise DisturbedError(f"{store}: differs from the undisturbed store: {', '.join(sorted(wrong))}")


def in_child(work: Callable[[], Any], *, log: Path) -> int:
    """Runs a function in a forked process; returns the process ID."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.setsid()
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001  # a forked process must never return
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def start(flags: list[str], *, log: Path, before: Callable[[], Any] = lambda: None) -> int:
    """Starts the command in a forked process; returns the process ID.

    Args:
      flags: Flags of `pipeline.precompute`.
      log: File for its output.
      before: Called first in that process.
    """

    def work() -> None:
        # Publishes each epoch at once, so that more kills hit publishing.
        publishing._POLL_SECONDS = publishing._REMOTE_POLL_SECONDS = 0.02
        publishing._TIME_SHARE = 0.5
        sys.argv = ["precompute", *flags]
        show_warnings()
        before()
        run_command(main, flags)

    return in_child(work, log=log)


def end_of(pid: int) -> int:
    """Waits for a process; returns its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def finish(flags: list[str], *, log: Path) -> None:
    """Runs the command to its end.

    Raises:
      DisturbedError: the command fails.
    """
    if code := end_of(start(flags, log=log)):
        raise DisturbedError(f"exit code {code} of `precompute {' '.join(flags)}`: {log.read_text()[-2000:]}")


def kill_after(pid: int, seconds: float) -> bool:
    """Kills a process after some seconds; returns whether it was still running."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return False
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    return end_of(pid) == -signal.SIGKILL


def watch_steps(store: Path, log: Path, *, die_before: int | None = None) -> None:
    """Makes this process log each publishing step in a store, and optionally kill itself before one of them.

    Args:
      store: Directory of the store.
      log: File for the steps.
      die_before: Number of the step, from 1, before which the process kills itself; None for never.
    """
    count = 0

    def on_step(what: str) -> None:
        nonlocal count
        count += 1
        with log.open("a") as file:
            file.write(f"{what}\n")
        if count == die_before:
            os.kill(os.getpid(), signal.SIGKILL)

    def watched(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            path = _path_of(arguments[0], named.get("dir_fd"))
            if path.is_relative_to(store):
                target = f" to {Path(arguments[1]).name}" if name in ("link", "replace") else ""
                on_step(f"{name} {path.relative_to(store)}{target}")
            return original(*arguments, **named)

        return call

    for name in STEPS:
        setattr(os, name, watched(name, getattr(os, name)))


def watch_requests(log: Path, *, die_before: int | None = None) -> None:
    """`watch_steps` for a store in a bucket, where a step is a write or removal of an object other than the lock."""
    count = 0

    def watched(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(bucket: BucketDirectory, what: str, *arguments: Any, **named: Any) -> Any:
            nonlocal count
            if not what.endswith(LOCK_FILE):
                count += 1
                with log.open("a") as file:
                    file.write(f"{name} {what}\n")
                if count == die_before:
                    os.kill(os.getpid(), signal.SIGKILL)
            return original(bucket, what, *arguments, **named)

        return call

    for name in ("_put", "remove"):
        setattr(BucketDirectory, name, watched(name, getattr(BucketDirectory, name)))


def _path_of(named: Any, directory: int | None) -> Path:
    """The path of a call of `os`, given as a path, as a descriptor, or relative to one."""
    if isinstance(named, int):
        return _open_path(named)
    return Path(named) if directory is None else _open_path(directory) / named


def _open_path(descriptor: int) -> Path:
    return Path(f"/proc/self/fd/{descriptor}").readlink()
