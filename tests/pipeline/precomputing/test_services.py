"""pipeline.precomputing.services: which errors of a runner's service are the user's, pass, or are defects."""

from __future__ import annotations

import pytest

from pipeline.errors import TryAgainError, UserError
from pipeline.precomputing.services import service_failure

exceptions = pytest.importorskip("google.api_core.exceptions", reason="the extra `dataflow` is not installed")


class DataflowRuntimeException(Exception):  # noqa: N818  # Beam's name
    """As Beam raises it for a job that has ended."""


def test_a_service_that_does_not_answer_is_tried_again() -> None:
    for error in (
        ConnectionError("reset"),
        exceptions.ServiceUnavailable("later"),
        exceptions.TooManyRequests("quota"),
    ):
        found = service_failure(error, runner="R")
        assert isinstance(found, TryAgainError)
        assert "--runner=R" in str(found)


@pytest.mark.parametrize(
    "kind", ["BadRequest", "Unauthorized", "Forbidden", "NotFound", "Conflict", "FailedPrecondition"]
)
def test_a_job_that_the_service_refuses_is_the_users(kind: str) -> None:
    found = service_failure(getattr(exceptions, kind)("enable the API"), runner="R")
    assert isinstance(found, UserError)
    assert not isinstance(found, TryAgainError)
    assert "enable the API" in str(found)


def test_a_failed_job_has_its_reason_in_one_line() -> None:
    error = DataflowRuntimeException("Dataflow pipeline failed. State: FAILED, Error:\nthe zone is full")
    found = service_failure(error, runner="R")
    assert isinstance(found, UserError)
    assert "the zone is full" in str(found)
    assert "\n" not in str(found)


def test_a_defect_in_a_worker_keeps_its_traceback() -> None:
    error = DataflowRuntimeException("Error:\nTraceback (most recent call last):\n  File 'x'\nKeyError: 'y'")
    assert service_failure(error, runner="R") is None
    assert service_failure(KeyError("y"), runner="R") is None
