"""pipeline.storage.retry: failures that are retried, and errors that are reported at once."""

from __future__ import annotations

import errno
import types
from collections.abc import Callable
from typing import Any

import pytest
from botocore.exceptions import ClientError
from gcsfs.retry import validate_response
from s3fs.errors import translate_boto_error

from pipeline.errors import DataError, TryAgainError, UserError
from pipeline.storage import retry
from pipeline.storage.retry import DAMAGED_ATTEMPTS, IncompleteError, with_retries


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.0)


class Failing:
    """Raises an error a number of times, then returns."""

    def __init__(self, error: Exception, times: int) -> None:
        self.error, self.times, self.calls = error, times, 0

    def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self.times:
            raise self.error
        return "done"


def test_a_passing_failure_is_retried() -> None:
    call = Failing(ConnectionResetError("reset"), 3)
    assert with_retries("x", call) == "done"
    assert call.calls == 4


def test_a_lasting_failure_is_reported_with_its_reason() -> None:
    with pytest.raises(TryAgainError, match=r"s3://b/x: cannot be read.* 3 attempts.*reset"):
        with_retries("s3://b/x: cannot be read", Failing(ConnectionResetError("reset"), 99), attempts=3)


@pytest.mark.parametrize(
    "error", [FileNotFoundError("x"), FileExistsError("x"), UserError("x"), DataError("x")]
)
def test_answers_of_the_server_are_not_retried(error: Exception) -> None:
    call = Failing(error, 1)
    with pytest.raises(type(error)):
        with_retries("x", call)
    assert call.calls == 1


def test_a_defect_keeps_its_traceback() -> None:
    call = Failing(TypeError("a defect"), 1)
    with pytest.raises(TypeError, match="a defect"):
        with_retries("x", call)
    assert call.calls == 1


def test_refused_access_is_not_retried() -> None:
    call = Failing(PermissionError("Access Denied"), 1)
    with pytest.raises(UserError, match=r"x: .*Access Denied"):
        with_retries("x", call)
    assert call.calls == 1


def test_a_full_local_disk_is_not_retried() -> None:
    call = Failing(OSError(errno.ENOSPC, "No space left on device", "/tmp/x"), 1)
    with pytest.raises(UserError, match="/tmp/x: No space left on device"):
        with_retries("x", call)
    assert call.calls == 1


def test_wrong_content_is_damage_in_the_end() -> None:
    call = Failing(IncompleteError("3 bytes came of 4"), 99)
    with pytest.raises(DataError, match="x: 3 bytes came of 4, in 4 attempts"):
        with_retries("x", call)
    assert call.calls == DAMAGED_ATTEMPTS


def gcs_answer(status: int, body: bytes | None) -> Callable[[], None]:
    """What gcsfs makes of a server's answer."""
    return lambda: validate_response(status, body, "b/o/x")


def test_a_failing_server_of_gcs_is_a_passing_failure() -> None:
    """To `get_file`, which does not read the body, it is a TypeError of Python's JSON parser."""
    for body in (None, b"busy", b'{"error": {"code": 503, "message": "busy"}}'):
        with pytest.raises(TryAgainError, match=r"gs://b/x: cannot be read.* 2 attempts"):
            with_retries("gs://b/x: cannot be read", gcs_answer(503, body), attempts=2)


@pytest.mark.parametrize("status", [401, 403])
def test_access_that_gcs_refuses_is_not_retried(status: int) -> None:
    body = b'{"error": {"code": %d, "message": "Anonymous caller does not have access"}}' % status
    with pytest.raises(UserError, match="gs://b/x: cannot be read") as caught:
        with_retries("gs://b/x: cannot be read", gcs_answer(status, body))
    assert caught.type is UserError


def test_existing_and_missing_objects_in_gcs_are_answers() -> None:
    for status, kind in ((404, FileNotFoundError), (412, FileExistsError)):
        with pytest.raises(kind):
            with_retries("x", gcs_answer(status, b""))


def test_an_upload_that_gcs_gives_up_is_reported_by_its_cause() -> None:
    def upload() -> None:
        try:
            raise ConnectionResetError("reset")
        except ConnectionResetError:
            raise AttributeError("'GCSFileSystem' object has no attribute 'location'")  # noqa: B904

    of_gcsfs = types.FunctionType(upload.__code__, {"__name__": "gcsfs.core"})
    with pytest.raises(TryAgainError, match=r"x.* 2 attempts: reset"):
        with_retries("x", of_gcsfs, attempts=2)


@pytest.mark.parametrize(
    ("status", "code", "refused"),
    [
        (403, "AccessDenied", True),
        (400, "InvalidToken", True),
        (400, "400", True),  # of a HEAD, whose answer has no body
        (400, "BadDigest", False),
        (409, "ConditionalRequestConflict", False),
        (503, "SlowDown", False),
        (500, "InternalError", False),
    ],
)
def test_refusals_of_s3_are_not_retried_and_failures_are(status: int, code: str, *, refused: bool) -> None:
    response: Any = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    call = Failing(translate_boto_error(ClientError(response, "PutObject")), 2)
    if refused:
        with pytest.raises(UserError, match=f"s3://b/x: cannot be written.*{code}"):
            with_retries("s3://b/x: cannot be written", call)
        assert call.calls == 1
    else:
        with_retries("s3://b/x: cannot be written", call)
        assert call.calls == 3
