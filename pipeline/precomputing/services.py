"""Errors of the services of Beam runners, such as Dataflow: unreachable, or access refused."""

from __future__ import annotations

import socket
import urllib.error

from pipeline.errors import TryAgainError, UserError
from pipeline.errors.causes import chain, find_reason, first_line

# Packages whose exceptions concern the connection to a service, and those of their exceptions that concern access.
_CLIENTS = {"apitools", "distributed", "google", "grpc", "httplib2", "requests", "urllib3"}
_REFUSALS = {"DefaultCredentialsError", "HttpForbiddenError", "HttpUnauthorizedError", "RefreshError"}


def service_failure(error: BaseException, *, runner: str) -> UserError | None:
    """The error of a service that does not answer or refuses access; None for other errors.

    Args:
      error: exception of the Beam runner.
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
                f"--runner={runner}: the service does not answer ({first_line(link)}); check the connection and rerun the same "
                "command (published data is safe)"
            )
    return None
