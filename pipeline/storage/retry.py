"""Retries of calls over the network, and one-line errors for those that keep failing.

s3fs and gcsfs retry some failures themselves. These retries are still needed: before each attempt a writer checks its lock, the
content is verified, and failures that the libraries do not retry, or report as errors of Python, are recognized.
"""

from __future__ import annotations

import errno
import logging
import secrets
import time
from collections.abc import Callable
from typing import TypeVar

from pipeline.errors import DataError, TryAgainError, UserError
from pipeline.errors.causes import chain, first_line, raised_in, system_error

Result = TypeVar("Result")

ATTEMPTS = 8
DAMAGED_ATTEMPTS = 4  # if the wrong content arrives as often, the object is damaged
FIRST_WAIT, LONGEST_WAIT = 0.25, 20.0  # seconds; doubled each time, about half a minute in total

# Libraries whose exceptions mean a failure of the connection or the server. By name, since they are optional.
_LIBRARIES = {
    "aiohttp",
    "aiobotocore",
    "botocore",
    "fsspec",
    "gcsfs",
    "google",
    "requests",
    "s3fs",
    "urllib3",
}
# Exceptions of botocore and google.auth for missing or incomplete credentials.
_CREDENTIALS = {
    "DefaultCredentialsError",
    "NoCredentialsError",
    "NoRegionError",
    "ParamValidationError",
    "PartialCredentialsError",
    "ProfileNotFound",
    "RefreshError",
}
# HTTP status by which S3 refuses a request. Damage in transit also has status 400. s3fs raises an OSError caused by the
# ClientError, also if the server is busy (503) or another client writes the object (409, 412).
_REFUSED_BY_S3 = {400, 401, 403}
_DAMAGED_IN_TRANSIT = {"BadDigest", "IncompleteBody", "RequestTimeout", "XAmzContentSHA256Mismatch"}
_LOCAL_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.EFBIG}
_log = logging.getLogger(__name__)


class IncompleteError(OSError):
    """Fewer or other bytes were received than expected."""


def with_retries(what: str, call: Callable[[], Result], *, attempts: int = ATTEMPTS) -> Result:
    """The result of a call over the network, retried with increasing pauses.

    Args:
      what: beginning of the error message, such as `s3://bucket/store/spec.json: cannot be read`.
      call: function whose side effects may be repeated.
      attempts: maximum number of attempts.

    Raises:
      FileNotFoundError, FileExistsError: the call raised it; not retried.
      UserError: access is refused, or the local disk is full; not retried.
      DataError: the wrong content arrived in several attempts.
      TryAgainError: all attempts failed.
    """
    for attempt in range(1, attempts + 1):
        try:
            return call()
        except (FileNotFoundError, FileExistsError, UserError, DataError):
            raise
        except Exception as error:
            if (refused := _refusal(what, error)) is not None:
                raise refused from error
            if not _is_passing(error):
                raise
            if _is_damage(error) and attempt >= DAMAGED_ATTEMPTS:
                raise DataError(
                    f"{what}: {error}, in {attempt} attempts; the object is damaged, restore it from a copy"
                ) from error
            if attempt == attempts:
                raise TryAgainError(
                    f"{what}; giving up after {attempts} attempts: {_reason(error)}; check the connection and rerun the same "
                    "command (published data is safe)"
                ) from error
            wait = min(FIRST_WAIT * 2 ** (attempt - 1), LONGEST_WAIT)
            _log.warning("%s (%s); retrying (attempt %d of %d)", what, _reason(error), attempt + 1, attempts)
            # Jitter, so that workers which failed together do not retry together.
            time.sleep(wait * (0.5 + secrets.randbelow(1000) / 1000))
    raise AssertionError(attempts)


def _is_damage(error: Exception) -> bool:
    """Whether the wrong content arrived. botocore raises its own error if its checksum differs."""
    return isinstance(error, IncompleteError) or type(error).__name__ == "FlexibleChecksumError"


def _is_passing(error: Exception) -> bool:
    return (
        isinstance(error, OSError)
        or type(error).__module__.split(".")[0] in _LIBRARIES
        # Some server errors become an AttributeError in botocore (boto3 issue 4754). In gcsfs's `get_file`, any except a 404
        # becomes a TypeError, because it parses a body as JSON that it has not read.
        or raised_in(error) in _LIBRARIES
    )


def _reason(error: Exception) -> str:
    """First line of a failure. When gcsfs gives up an upload, it raises an AttributeError caused by the failure."""
    causes = [link for link in chain(error) if not isinstance(link, AttributeError)]
    return first_line(causes[0] if causes else error)


def _refusal(what: str, error: Exception) -> UserError | None:
    for link in chain(error):
        library = type(link).__module__.split(".")[0]
        if isinstance(link, OSError) and link.errno in _LOCAL_ERRORS:
            return system_error(link)
        if (
            isinstance(link, PermissionError)
            or (library in _LIBRARIES and type(link).__name__ in _CREDENTIALS)
            or _is_refused_by_s3(link)
            or _is_forbidden_by_gcs(link)
        ):
            return UserError(
                f"{what}: access refused ({first_line(link)}); grant this machine access through the environment variables or "
                "files of the bucket's own tools"
            )
    return None


def s3_error(error: BaseException) -> tuple[int, str] | None:
    """HTTP status and code of a botocore ClientError, None for other errors."""
    response = getattr(error, "response", None)
    if not isinstance(response, dict):
        return None
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return int(status), str(response.get("Error", {}).get("Code"))


def _is_refused_by_s3(error: BaseException) -> bool:
    status, code = s3_error(error) or (0, "")
    return status in _REFUSED_BY_S3 and code not in _DAMAGED_IN_TRANSIT


def _is_forbidden_by_gcs(error: BaseException) -> bool:
    """Whether it is gcsfs's error for status 403 or 401."""
    if isinstance(error, OSError):
        return str(error).startswith("Forbidden: ")  # a plain OSError without a code: only the text differs
    return type(error).__module__ == "gcsfs.retry" and str(getattr(error, "code", "")) == "401"
