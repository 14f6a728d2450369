"""What a runner's service says when a job is submitted: unreachable, or no right to it."""

from __future__ import annotations

import socket
import urllib.error

from pipeline.errors import TryAgainError, UserError
from pipeline.errors.causes import chain, find_reason, first_line

# Packages whose exceptions come from the way to a service, and their exceptions that say who may not go it.
_CLIENTS = {"apitools", "distributed", "google", "grpc", "httplib2", "requests", "urllib3"}
_REFUSALS = {"DefaultCredentialsError", "HttpForbiddenError", "HttpUnauthorizedError", "RefreshError"}


def service_failure(error: BaseException, *, runner: str) -> UserError | None:
    """The one line for a service that does not answer, or refuses this user; None for anything else.

    Args:
      error: as Beam's runner raised it.
      runner: its name.
    """
    if find_reason(error) is not None:
        return None
    for link in chain(error):
        client = type(link).__module__.split(".")[0] in _CLIENTS
        if client and type(link).__name__ in _REFUSALS:
            return UserError(f"--runner={runner}: access refused ({first_line(link)}); check the credentials")
        network = isinstance(link, ConnectionError | TimeoutError | socket.gaierror | urllib.error.URLError)
        if client or network or "Unable to fetch remote job server jar" in str(link):
            return TryAgainError(
                f"--runner={runner}: its service does not answer ({first_line(link)}); check the connection, and run the "
                "same command again: nothing published is lost"
            )
    return None
