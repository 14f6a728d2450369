"""Services of Beam runners, such as Dataflow: unreachable, access refused, or a job that has failed."""

from __future__ import annotations

import socket
import urllib.error

from pipeline.errors import TryAgainError, UserError
from pipeline.errors.causes import chain, find_reason, first_line
from pipeline.storage.bucket import BucketDirectory

# Packages whose exceptions concern the connection to a service, and those of their exceptions that concern access.
_CLIENTS = {"apitools", "distributed", "google", "grpc", "httplib2", "requests", "urllib3"}
_PROBE = ".view-distill-probe"
_REFUSALS = {"DefaultCredentialsError", "HttpForbiddenError", "HttpUnauthorizedError", "RefreshError"}
_TRANSIENT = {408, 429}  # HTTP status: timeout, too many requests


def check_staging(place: str) -> None:
    """Tries to write to the directory in a bucket where a job is staged.

    Raises:
      UserError: the bucket does not exist, or access is refused.
      TryAgainError: the bucket cannot be reached.
    """
    directory = BucketDirectory(place)
    directory.write(_PROBE, b"")
    directory.remove(_PROBE)


def _failed_job(error: BaseException, *, runner: str) -> UserError | None:
    """The error of a job that Dataflow has ended; None for other errors and for a defect of ours in a worker."""
    text = " ".join(str(error).split())
    if type(error).__name__ != "DataflowRuntimeException" or "Traceback (most recent call last)" in text:
        return None
    return UserError(
        f"--runner={runner}: the job has failed ({text[:600]}); published data is safe: rerun the same command when the cause "
        "is removed"
    )


def service_failure(error: BaseException, *, runner: str) -> UserError | None:
    """The error of a service that does not answer, refuses a job or has ended it; None for other errors.

    Args:
      error: exception of the Beam runner.
    """
    if find_reason(error) is not None:
        return None
    for link in chain(error):
        if (failed := _failed_job(link, runner=runner)) is not None:
            return failed
        client = type(link).__module__.split(".")[0] in _CLIENTS
        if client and type(link).__name__ in _REFUSALS:
            return UserError(f"--runner={runner}: access refused ({first_line(link)}); check the credentials")
        code = getattr(link, "code", None)
        if client and isinstance(code, int) and 400 <= code < 500 and code not in _TRANSIENT:
            return UserError(
                f"--runner={runner}: the service refuses the job ({first_line(link)}); correct the flags or the permissions"
            )
        network = isinstance(link, ConnectionError | TimeoutError | socket.gaierror | urllib.error.URLError)
        if client or network or "Unable to fetch remote job server jar" in str(link):
            return TryAgainError(
                f"--runner={runner}: the service does not answer ({first_line(link)}); check the connection and rerun the same "
                "command (published data is safe)"
            )
    return None
