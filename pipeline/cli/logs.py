"""What of the libraries' logs reaches the user of a command: every warning and error, but for those named here.

Standard error belongs to our own lines and the progress bar. What is left out means nothing to the user, or is
told in one line at the end as well; each entry says why.
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

# (logger, start of the message): why it is left out.
KNOWN = {
    # At the import of Beam where its BigQuery client is not installed, which nothing here uses.
    ("root", "apitools not found, and bigquery client libraries are not available"),
    # A worker process of Beam's was given no pickled `__main__`; our steps are imported by their modules' names.
    ("__main__", "No semi_persistent_directory found"),
    # A second copy of what a worker process has written to the same standard error.
    ("apache_beam.runners.portability.local_job_service", "Worker: "),
    # An exception of a step, with the traceback of the process where it was raised. The runner raises it again
    # in the command's own process, which shows it: in one line where it is the user's or the data's, else whole.
    ("apache_beam.runners.worker.sdk_worker", "Error processing instruction "),
    # A request to a bucket that failed, with its traceback: it is tried again, or told in one line.
    ("gcsfs", "_request "),
    ("gcsfs", "_get_file_request "),
}


def is_meant(record: logging.LogRecord) -> bool:
    """Whether a log record is for the user."""
    message = str(record.msg)
    if any(record.name == logger and message.startswith(start) for logger, start in KNOWN):
        return False
    raised = record.exc_info[1] if record.exc_info else None
    if raised is None:
        return True
    # Beam logs what a step raises, and what a Ctrl-C breaks, with tracebacks; `run_command` tells both in one line.
    return find_reason(raised) is None and not any(
        isinstance(link, KeyboardInterrupt) or _is_lost_worker(link) for link in chain(raised)
    )


def _is_lost_worker(error: BaseException) -> bool:
    """Whether it is a runner's channel to a worker process that has ended, as grpc's server raises it.

    Each thread that had one says so; the main thread has lost the worker too, and tells it or has ended it.
    """
    return (type(error).__module__, type(error).__name__) == ("grpc", "RpcError")


def _in_thread(arguments: threading.ExceptHookArgs) -> None:
    """Shows what ends a thread, unless it is a lost worker."""
    if arguments.exc_value is None or not _is_lost_worker(arguments.exc_value):
        threading.__excepthook__(arguments)


class _StandardError(logging.StreamHandler):
    """Writes to what `sys.stderr` is at the time."""

    def __init__(self) -> None:
        logging.Handler.__init__(self, logging.WARNING)

    @property
    def stream(self) -> object:  # type: ignore[override]
        return sys.stderr


class ReaderlessStandardError:
    """Standard error that goes on, without a word, when whoever read it has closed the pipe.

    A message is no reason to lose work. And a progress bar that fails to write keeps its library's lock, so that the next
    one would wait for it without end.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes text, or drops it."""
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
    """Libraries put names of files and answers of servers into their messages."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), keep="\n\t")


def show_warnings() -> None:
    """Shows logged warnings and errors on standard error, except `KNOWN` ones; for the start of a process.

    Beam's and TensorFlow's modules log before they configure anything, whereupon `logging` installs a handler
    of its own; with this one there, it does not.
    """
    # TensorFlow 2.15 logs three meaningless errors at every import ("Unable to register cuDNN factory ..."); real errors reach
    # Python as exceptions. TensorFlow reads the level when it is imported, and child processes inherit it.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    handler = _StandardError()
    handler.setFormatter(_Printable("%(levelname)s: %(name)s: %(message)s"))
    handler.addFilter(is_meant)
    logging.getLogger().addHandler(handler)
    threading.excepthook = _in_thread
