"""Worker process of Beam's Python runner: Beam's `sdk_worker_main`, with less output, and ended with the command.

Beam's own worker command sets the root logger to INFO and prints every channel that it opens over the progress bar. A worker
ends with the command that started it: the command holds a lock, and a worker that gets this lock exits. Errors are reported
by the command.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from pipeline.cli.allocator import keep_freed_memory
from pipeline.cli.environment import grow_device_memory, use_keras_2
from pipeline.cli.logs import show_warnings
from pipeline.errors import Interrupted
from pipeline.errors.causes import find_reason
from pipeline.storage.lock import flock

BEAM_COMMAND = "apache_beam.runners.worker.sdk_worker_main"
_LOCK = "VIEW_DISTILL_COMMAND_LOCK"  # environment variable of the workers


@contextlib.contextmanager
def workers_end_with_command() -> Iterator[Callable[[BaseException], None]]:
    """Ends worker processes that are started in this context with it, with this process, and at SIGINT, SIGTERM or SIGHUP.

    Yields a function with which another thread ends the work; the context raises the exception that is passed to it.

    After a signal, the workers have to end first: Beam waits for them before it propagates an exception, and if only this
    process received the signal, as from `kill`, they wait for Beam.

    Raises:
      KeyboardInterrupt: after SIGINT.
      Interrupted: after SIGTERM (exit code 143), or after SIGHUP (129), as from a dropped ssh connection, unless SIGHUP is
        ignored (nohup).
    """
    with tempfile.NamedTemporaryFile(prefix="precompute-", suffix=".lock") as lock:
        flock(lock)
        os.environ[_LOCK] = lock.name

        stops: list[BaseException] = []

        def end(number: int, frame: FrameType | None) -> None:
            del frame
            lock.file.close()  # which releases it
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            stops.append(
                Interrupted(
                    f"{signal.Signals(number).name}: published data is safe; run the same command to continue",
                    exit_code=128 + number,
                )
            )
            raise stops[0]

        def fail(error: BaseException) -> None:
            stops.append(error)
            os.kill(os.getpid(), signal.SIGTERM)

        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, end) for number in numbers}
        try:
            yield fail
        except Exception:
            if stops:  # Beam wraps exceptions that are raised in a step of this process
                raise stops[0] from None
            raise
        finally:
            del os.environ[_LOCK]
            for number, handler in before.items():
                signal.signal(number, handler)


def _end_with_command() -> None:
    """Ends this process when the command that started it releases its lock."""
    with contextlib.suppress(FileNotFoundError), Path(os.environ[_LOCK]).open() as lock:
        flock(lock, shared=True)
    os._exit(0)  # the runner reports other exit codes as a crash


class StandardError:
    """A stream that drops the tracebacks of errors that the command reports in one line."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes text unless it is such a traceback."""
        if text.startswith("Traceback ") and find_reason(RuntimeError(text)) is not None:
            return len(text)
        return self._stream.write(text)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(0))
    if _LOCK in os.environ:
        threading.Thread(target=_end_with_command, daemon=True).start()
    show_warnings()
    use_keras_2()
    keep_freed_memory()
    grow_device_memory()
    sys.stderr = StandardError(sys.stderr)  # type: ignore[assignment]
    runpy.run_module(BEAM_COMMAND, run_name="__main__", alter_sys=True)
