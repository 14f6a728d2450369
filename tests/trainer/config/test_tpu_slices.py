"""trainer.config.tpu_slices: which TPU types are taken."""

from __future__ import annotations

import pytest

from pipeline.errors import UserError
from trainer.config.tpu_slices import check_hosts, check_type


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("v2-8", "v2-8"),
        ("v3-8", "v3-8"),
        ("v4-8", "v4-8"),
        ("v5e-8", "v5litepod-8"),
        ("V5LitePod-4", "v5litepod-4"),
        ("v5p-8", "v5p-8"),
    ],
)
def test_types_of_one_host_are_taken_by_the_apis_name(asked: str, expected: str):
    assert check_type(asked) == expected


@pytest.mark.parametrize(
    ("asked", "hosts"), [("v2-32", 4), ("v3-2048", 256), ("v4-16", 2), ("v5e-16", 4), ("v5p-32", 4)]
)
def test_types_of_several_hosts_are_refused_with_the_reason(asked: str, hosts: int):
    with pytest.raises(
        UserError, match=f"--type={asked}: a slice of {hosts} hosts; slices of a single host are"
    ):
        check_type(asked)


@pytest.mark.parametrize("asked", ["v3", "v3-", "v3-0", "v9-8", "", "a100-8"])
def test_unknown_type_is_refused(asked: str):
    with pytest.raises(UserError, match="no such TPU type; take one of v2-8"):
        check_type(asked)


def test_types_that_tensorflow_does_not_run_on_are_refused():
    with pytest.raises(UserError, match="TensorFlow does not support TPUs from v6e on"):
        check_type("v6e-8")


def test_hosts_are_counted():
    check_hosts("--tpu=pod", 1)
    with pytest.raises(UserError, match="--tpu=pod: a slice of 4 hosts"):
        check_hosts("--tpu=pod", 4)
