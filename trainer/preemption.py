"""SIGTERM: the step under way ends, a checkpoint is saved, and the process exits with a code of its own.

Cloud machines that are taken away get SIGTERM some seconds before; the same command continues the run later.
"""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

EXIT_PREEMPTED = 128 + signal.SIGTERM  # 143, as a shell reports it


class Preempted(Exception):  # noqa: N818 - no error, a way to end
    """The run was asked to stop, and has saved."""

    def __init__(self, step: int) -> None:
        super().__init__(f"SIGTERM: saved at step {step}; run the same command to continue")
        self.step = step


class Preemption:
    """Within the context, SIGTERM sets `requested` instead of ending the process."""

    def __init__(self) -> None:
        self.requested = False
        self._before: signal.Handlers | int | None = None

    def __enter__(self) -> Preemption:
        self._before = signal.signal(signal.SIGTERM, self._note)  # type: ignore[assignment]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self.requested = True
