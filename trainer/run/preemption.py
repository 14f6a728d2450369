"""Handles SIGTERM, Ctrl-C and SIGHUP: the current step ends, a checkpoint is saved, and the exit code is 143, 130 or 129.

Preempted cloud machines get SIGTERM some seconds before they stop; a lost ssh connection sends SIGHUP. The same command
continues the run later.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from pipeline.errors import EXIT_HANGUP, EXIT_INTERRUPTED, EXIT_TERMINATED, Interrupted
from pipeline.errors.causes import find_reason

EXIT_CODES = {
    signal.SIGTERM: EXIT_TERMINATED,
    signal.SIGINT: EXIT_INTERRUPTED,
    signal.SIGHUP: EXIT_HANGUP,
}
_CLOSING_MILLISECONDS = 500  # time for the reader of this process's output to end after SIGHUP


def handle_signals(handler: Callable[[int, FrameType | None], None]) -> dict[signal.Signals, Any]:
    """Installs a handler for the signals of `EXIT_CODES`; returns the previous handlers.

    An ignored SIGHUP, as under nohup, stays ignored.
    """
    numbers = [n for n in EXIT_CODES if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in numbers}


def detach_closed_outputs() -> None:
    """Redirects standard output and error to /dev/null if their terminal or pipe is closed.

    Otherwise a progress bar would fail after a SIGHUP, and end the run before it is saved.
    """
    poll = select.poll()
    for number in (1, 2):
        poll.register(number, 0)  # errors only
    closed = poll.poll(_CLOSING_MILLISECONDS)
    for number, _ in closed:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, number)
        os.close(null)


class Preemption:
    """Context in which SIGTERM, SIGINT and SIGHUP end the run without losing work.

    While there is nothing to save (at the start, during evaluations and after the last step), a signal raises `Interrupted` at
    once. Between `defer` and `resume`, it is only recorded. After a recorded signal, a further Ctrl-C kills the process. A
    further SIGTERM does not, because supervisors send it to a process and to its group.
    """

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self._deferred = False
        self._saved = "saved data is kept"
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Preemption:
        self._before = handle_signals(self._record)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if isinstance(error, Exception) and find_reason(error) is None:
            self._end()  # TensorFlow turns an exception in a Python callback into its own

    def defer(self) -> None:
        """Defers signals: there is something to save."""
        self._deferred = True

    def resume(self, saved: str) -> None:
        """Ends the deferral, and the run if a signal was recorded.

        Raises:
          Interrupted: a signal was recorded; has the exit code of that signal.
        """
        self._saved, self._deferred = saved, False
        self._end()

    def _end(self) -> None:
        if self.requested is not None:
            raise Interrupted(
                f"{self.requested.name}: {self._saved}; run the same command to continue",
                exit_code=EXIT_CODES[self.requested],
            )

    def _record(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.requested = self.requested or signal.Signals(number)
        if number == signal.SIGHUP:
            detach_closed_outputs()
        if not self._deferred:
            self._end()
        # A Python handler runs only after TensorFlow returns; the system's default handler runs at once.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        # Not print: the signal may have interrupted a print, whose lock is not reentrant.
        text = (
            f"\n{self.requested.name}: will save after this step; press Ctrl-C again to quit without saving\n"
        )
        with contextlib.suppress(OSError):
            os.write(2, text.encode())
