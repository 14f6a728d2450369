"""What is tried again when a link or a server fails for a moment, and what is told when it does not recover."""

from __future__ import annotations

import errno
import logging
import secrets
import time
from collections.abc import Callable
from typing import TypeVar

from pipeline.errors import DataError, TryAgainError, UserError
from pipeline.errors.causes import chain, first_line, of_the_system, raised_in

Result = TypeVar("Result")

ATTEMPTS = 8
DAMAGED_ATTEMPTS = 4  # of what comes, but is not what it should be: in the end it is that in the bucket
FIRST_WAIT, LONGEST_WAIT = 0.25, 20.0  # seconds; doubled each time: about half a minute in all

# Libraries whose exceptions tell of the link or the server. Named, for a bucket's library is an extra.
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
# Of botocore and google.auth: nobody said who asks, or for what.
_CREDENTIALS = {
    "DefaultCredentialsError",
    "NoCredentialsError",
    "NoRegionError",
    "ParamValidationError",
    "PartialCredentialsError",
    "ProfileNotFound",
    "RefreshError",
}
# Of S3, to a request that came: what was asked is refused, but for damage on the way, which has a status of 400, too. s3fs
# has the ClientError as the cause of its OSError, also where the server is busy (503) or another writes there (409, 412).
_REFUSED_BY_S3 = {400, 401, 403}
_DAMAGED_ON_THE_WAY = {"BadDigest", "IncompleteBody", "RequestTimeout", "XAmzContentSHA256Mismatch"}
_OF_THIS_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.EFBIG}
_log = logging.getLogger(__name__)


class IncompleteError(OSError):
    """Fewer or other bytes came than were sent."""


def with_retries(what: str, call: Callable[[], Result], *, attempts: int = ATTEMPTS) -> Result:
    """The result of a call over the network, tried again with growing pauses.

    Args:
      what: such as `s3://bucket/store/spec.json: cannot be read`; begins the error.
      call: without side effects that a repetition would double.
      attempts: in all.

    Raises:
      FileNotFoundError, FileExistsError: of the call, at once.
      UserError: access is refused, or this machine's disk is full, at once.
      DataError: other bytes came than should, several times.
      TryAgainError: it failed each time.
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
                raise DataError(f"{what}: {error}, {attempt} times in a row; it is damaged there") from error
            if attempt == attempts:
                raise TryAgainError(
                    f"{what} ({_reason(error)}), {attempts} times in a row; run the same command again when the link is "
                    "back: nothing published is lost"
                ) from error
            wait = min(FIRST_WAIT * 2 ** (attempt - 1), LONGEST_WAIT)
            _log.warning("%s (%s); trying again, %d of %d", what, _reason(error), attempt + 1, attempts)
            # Workers that failed together do not come back together.
            time.sleep(wait * (0.5 + secrets.randbelow(1000) / 1000))
    raise AssertionError(attempts)


def _is_damage(error: Exception) -> bool:
    """Whether other bytes came than should; botocore compares a checksum of its own."""
    return isinstance(error, IncompleteError) or type(error).__name__ == "FlexibleChecksumError"


def _is_passing(error: Exception) -> bool:
    return (
        isinstance(error, OSError)
        or type(error).__module__.split(".")[0] in _LIBRARIES
        # Some server errors are an AttributeError (boto3's issue 4754), and to gcsfs's `get_file` any but a 404 is a
        # TypeError: it parses as JSON the body that it has not read.
        or raised_in(error) in _LIBRARIES
    )


def _reason(error: Exception) -> str:
    """What a failure says first; gcsfs breaks with an AttributeError where it gives an upload up, and it is the cause."""
    causes = [link for link in chain(error) if not isinstance(link, AttributeError)]
    return first_line(causes[0] if causes else error)


def _refusal(what: str, error: Exception) -> UserError | None:
    for link in chain(error):
        library = type(link).__module__.split(".")[0]
        if isinstance(link, OSError) and link.errno in _OF_THIS_MACHINE:
            return of_the_system(link)
        if (
            isinstance(link, PermissionError)
            or (library in _LIBRARIES and type(link).__name__ in _CREDENTIALS)
            or _is_refused_by_s3(link)
            or _is_forbidden_by_gcs(link)
        ):
            return UserError(
                f"{what}: access refused ({first_line(link)}); give this machine the right to it, by the environment or "
                "the files that the bucket's own tools take"
            )
    return None


def s3_error(error: BaseException) -> tuple[int, str] | None:
    """HTTP status and code of a botocore ClientError, else None."""
    response = getattr(error, "response", None)
    if not isinstance(response, dict):
        return None
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return int(status), str(response.get("Error", {}).get("Code"))


def _is_refused_by_s3(error: BaseException) -> bool:
    status, code = s3_error(error) or (0, "")
    return status in _REFUSED_BY_S3 and code not in _DAMAGED_ON_THE_WAY


def _is_forbidden_by_gcs(error: BaseException) -> bool:
    """Whether it is gcsfs's OSError of status 403, or its HttpError of 401."""
    if isinstance(error, OSError):
        return str(error).startswith("Forbidden: ")
    return type(error).__module__ == "gcsfs.retry" and str(getattr(error, "code", "")) == "401"
