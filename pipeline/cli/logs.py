"""Filters third-party log output shown to the user: warnings and errors, except those listed here.

Standard error is for our own messages and progress bars. The listed messages are meaningless to the user, or are reported on one line
at the end as well.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any, TextIO

from pipeline.errors.causes import chain, find_reason
from pipeline.errors.text import printable

# (logger, start of the message), each with the reason why it is hidden.
KNOWN = {
    # When Beam is imported without its BigQuery client, which this project does not use.
    ("root", "apitools not found, and bigquery client libraries are not available"),
    # A Beam worker process has no pickled `__main__`; our steps are imported by module name.
    ("__main__", "No semi_persistent_directory found"),
    # Repeats what a worker process has written to the same standard error.
    ("apache_beam.runners.portability.local_job_service", "Worker: "),
    # An exception of a step, with its traceback in the worker process. The runner raises it again in the command's process, which
    # reports it.
    ("apache_beam.runners.worker.sdk_worker", "Error processing instruction "),
    # A failed request to a bucket, with its traceback. It is retried, or reported on one line.
    ("gcsfs", "_request "),
    ("gcsfs", "_get_file_request "),
}


def is_meant(record: logging.LogRecord) -> bool:
    """Whether a log record is shown to the user."""
    message = str(record.msg)
    if any(record.name == logger and message.startswith(start) for logger, start in KNOWN):
        return False
    raised = record.exc_info[1] if record.exc_info else None
    if raised is None:
        return True
    # Beam logs exceptions of steps, and those that follow Ctrl-C, with tracebacks. `run_command` reports both on one line.
    return find_reason(raised) is None and not any(
        isinstance(link, KeyboardInterrupt) or _is_lost_worker(link) for link in chain(raised)
    )


def _is_lost_worker(error: BaseException) -> bool:
    """Whether it is the error of grpc's server for the channel to a worker process that has ended.

    Every thread with such a channel raises it. The main thread reports the lost worker, or has ended it.
    """
    return (type(error).__module__, type(error).__name__) == ("grpc", "RpcError")


def _in_thread(arguments: threading.ExceptHookArgs) -> None:
    """Prints the exception that ended a thread, except for a lost worker."""
    if arguments.exc_value is None or not _is_lost_worker(arguments.exc_value):
        threading.__excepthook__(arguments)


class _StandardError(logging.StreamHandler):
    """Writes to the current `sys.stderr`."""

    def __init__(self) -> None:
        logging.Handler.__init__(self, logging.WARNING)

    @property
    def stream(self) -> object:  # type: ignore[override]
        return sys.stderr


class ReaderlessStandardError:
    """Standard error that silently drops text once the reader has closed the pipe.

    Work must not be lost because of a message. Besides, a progress bar that fails to write keeps tqdm's lock, and the next one waits
    for it indefinitely.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes or drops text."""
        with self._dropping():
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flushes the stream."""
        with self._dropping():
            self._stream.flush()

    @contextlib.contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


class _Printable(logging.Formatter):
    """Escapes control characters, since libraries log file names and responses of servers."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), keep="\n\t")


def show_warnings() -> None:
    """Shows logged warnings and errors on standard error, except `KNOWN` ones. Called when a command or Beam worker starts.

    Modules of Beam and TensorFlow log before they configure logging, and `logging` then installs its own handler, unless there is one
    already.
    """
    # TensorFlow 2.15 logs three meaningless errors at every import ("Unable to register cuDNN factory ..."); real errors reach
    # Python as exceptions. TensorFlow reads the level when it is imported, and child processes inherit it.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    handler = _StandardError()
    handler.setFormatter(_Printable("%(levelname)s: %(name)s: %(message)s"))
    handler.addFilter(is_meant)
    logging.getLogger().addHandler(handler)
    threading.excepthook = _in_thread
