"""Starts a worker process of Beam's Python runner: `sdk_worker_main`, which says what goes wrong and nothing else.

Beam's own command sets the root logger to INFO and prints each channel that it opens, over the progress bar. A
Ctrl-C reaches the workers as well; their command tells it.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from typing import Any, TextIO

from pipeline.errors import find_error
from pipeline.logs import show_warnings

BEAM_COMMAND = "apache_beam.runners.worker.sdk_worker_main"


class StandardError:
    """A stream without the tracebacks that Beam prints of errors which the command will tell in one line."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes text, unless it is such a traceback."""
        if text.startswith("Traceback ") and find_error(RuntimeError(text)) is not None:
            return len(text)
        return self._stream.write(text)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(0))  # any other code is a crash to the runner, and told
    show_warnings()
    sys.stderr = StandardError(sys.stderr)  # type: ignore[assignment]
    runpy.run_module(BEAM_COMMAND, run_name="__main__", alter_sys=True)
