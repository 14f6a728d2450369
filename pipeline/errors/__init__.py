"""Exceptions that commands report on one line, and their exit codes.

A user's mistake (`UserError`) exits with 2. Corrupt or mismatched data (`DataError`) exit with 3; the message shows both sides. An
unreachable service (`TryAgainError`) exits with 75. Any other exception is a defect and keeps its traceback.
"""

from __future__ import annotations

import signal

from pipeline.errors.text import printable

EXIT_USER_ERROR = 2
EXIT_DATA_ERROR = 3
EXIT_TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: "the user is invited to retry"
EXIT_INTERRUPTED = 128 + signal.SIGINT  # as shells report signals
EXIT_TERMINATED = 128 + signal.SIGTERM
EXIT_HANGUP = 128 + signal.SIGHUP


class _OneLineError(Exception):
    """An error whose message is always one line, also if it quotes a file."""

    def __str__(self) -> str:
        return printable(super().__str__())


class UserError(_OneLineError):
    """A user's mistake: what is wrong, the value, what was expected, what to do. Exit code 2."""

    exit_code = EXIT_USER_ERROR


class TryAgainError(UserError):
    """An external failure ended the work, and rerunning the same command continues it. Exit code 75."""

    exit_code = EXIT_TRY_AGAIN


class UnpublishedError(UserError):
    """A store has no published data yet."""


class DataError(_OneLineError):
    """Data are corrupt, or two sides differ; the message shows both. Exit code 3."""

    exit_code = EXIT_DATA_ERROR


class Interrupted(KeyboardInterrupt):
    """A signal ended the command in an orderly way; printed without a traceback.

    It is a KeyboardInterrupt, so that libraries do not handle it as a failure.

    Args:
      message: one line that describes the state of the work.
      exit_code: 128 + number of the signal, as shells report it.
    """

    def __init__(self, message: str, *, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
