"""SIGTERM and Ctrl-C: the step under way ends, a checkpoint is saved, and the process exits 143 or 130.

Cloud machines that are taken away get SIGTERM some seconds before; the same command continues the run later.
"""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType
from typing import Any

from pipeline.errors import EXIT_INTERRUPTED, EXIT_TERMINATED, Interrupted, find_reason

EXIT_CODES = {signal.SIGTERM: EXIT_TERMINATED, signal.SIGINT: EXIT_INTERRUPTED}


class Preemption:
    """Within the context, SIGTERM and SIGINT end the run where that loses nothing.

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
        self._before = {number: signal.signal(number, self._note) for number in EXIT_CODES}
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
        if not self._deferred:
            self._end()
        # Python's own handling waits for TensorFlow to come back; the system's does not.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        # Not print: the signal may have come in the middle of one, whose lock is not for a second one.
        text = f"\n{self.requested.name}: saving after this step; Ctrl-C ends at once, without\n"
        os.write(2, text.encode())
