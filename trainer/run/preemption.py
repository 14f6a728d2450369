"""SIGTERM, Ctrl-C and SIGHUP: the current step ends, a checkpoint is saved, and the process exits 143, 130 or 129.

Cloud machines that are taken away get SIGTERM some seconds before; a dropped ssh connection sends SIGHUP. The same
command continues the run later.
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
_CLOSING_MILLISECONDS = 500  # in which the reader of this process's output ends, if SIGHUP ends it too


def handle_signals(handler: Callable[[int, FrameType | None], None]) -> dict[signal.Signals, Any]:
    """Installs a handler for the signals of `EXIT_CODES`; returns the handlers before.

    A SIGHUP that is ignored, as under nohup, stays ignored.
    """
    numbers = [n for n in EXIT_CODES if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in numbers}


def detach_closed_outputs() -> None:
    """Points standard output and error to /dev/null where their terminal or the reader of their pipe is gone.

    After a SIGHUP the terminal refuses each write, and a `tee` has ended as well: a progress bar would end the run
    before it has saved.
    """
    poll = select.poll()
    for number in (1, 2):
        poll.register(number, 0)  # errors alone
    closed = poll.poll(_CLOSING_MILLISECONDS)
    for number, _ in closed:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, number)
        os.close(null)


class Preemption:
    """Within the context, SIGTERM, SIGINT and SIGHUP end the run where that loses nothing.

    While nothing would be lost (at the start and while the first step is traced, in evaluations, after the last
    step) they end it at once, by an `Interrupted`. From `defer` to `resume` they are only noted. Once one was
    noted, a (second) Ctrl-C ends the process on the spot, as if killed; a second SIGTERM does not, for
    supervisors send it to a process and again to its group.

    Attributes:
      requested: the first signal that came, or None.
    """

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self._deferred = False
        self._saved = "what was saved stays"
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Preemption:
        self._before = handle_signals(self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if isinstance(error, Exception) and find_reason(error) is None:
            self._end()  # TensorFlow makes an error of its own of what its calls of Python raise

    def defer(self) -> None:
        """From now on there is something to save."""
        self._deferred = True

    def resume(self, saved: str) -> None:
        """From now on there is not; a signal that was noted ends the run here.

        Args:
          saved: is said then, such as "saved at step 7".

        Raises:
          Interrupted: a signal was noted; it has that signal's exit code.
        """
        self._saved, self._deferred = saved, False
        self._end()

    def _end(self) -> None:
        if self.requested is not None:
            raise Interrupted(
                f"{self.requested.name}: {self._saved}; run the same command to continue",
                exit_code=EXIT_CODES[self.requested],
            )

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.requested = self.requested or signal.Signals(number)
        if number == signal.SIGHUP:
            detach_closed_outputs()
        if not self._deferred:
            self._end()
        # Python's own handling waits for TensorFlow to come back; the system's does not.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        # Not print: the signal may have come in the middle of one, whose lock is not for a second one.
        text = f"\n{self.requested.name}: saving after this step; Ctrl-C ends at once, without\n"
        with contextlib.suppress(OSError):
            os.write(2, text.encode())
