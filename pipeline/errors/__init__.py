"""The exceptions by which a command fails on purpose, and their exit codes.

A user's mistake (`UserError`) ends in one line on standard error and exit code 2. Corrupt or mismatched data (`DataError`)
is fatal, shows both sides, and exits 3. An unreachable service (`TryAgainError`) exits 75. Any other exception is a defect
and keeps its traceback.
"""

from __future__ import annotations

import signal

from pipeline.errors.text import printable

EXIT_USER_ERROR = 2
EXIT_DATA_ERROR = 3
EXIT_TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: "the user is invited to retry"
EXIT_INTERRUPTED = 128 + signal.SIGINT  # as a shell reports it
EXIT_TERMINATED = 128 + signal.SIGTERM
EXIT_HANGUP = 128 + signal.SIGHUP


class _OneLineError(Exception):
    """Its message is one line, whatever text of a foreign store is in it."""

    def __str__(self) -> str:
        return printable(super().__str__())


class UserError(_OneLineError):
    """What is wrong, what was got, what was expected, what to do: in one line. Exit code 2."""

    exit_code = EXIT_USER_ERROR


class TryAgainError(UserError):
    """Something outside ended the work, and nothing of it is lost: the same command continues it. Exit code 75."""

    exit_code = EXIT_TRY_AGAIN


class UnpublishedError(UserError):
    """A store has nothing for readers yet."""


class DataError(_OneLineError):
    """Data are corrupt, or two sides do not match; the message shows both. Exit code 3."""

    exit_code = EXIT_DATA_ERROR


class Interrupted(KeyboardInterrupt):
    """A signal ended the command in an orderly way: the message says where; no traceback.

    A KeyboardInterrupt, so that no library takes it for a failure to be mended.

    Args:
      message: one line.
      exit_code: 128 + the signal's number, as a shell reports it.
    """

    def __init__(self, message: str, *, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
