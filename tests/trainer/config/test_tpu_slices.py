"""trainer.config.tpu_slices: accepted TPU types."""

from __future__ import annotations

import pytest

from pipeline.errors import UserError
from trainer.config.tpu_slices import check_hosts, check_type, runtime_version


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
def test_types_with_one_host_are_accepted_under_the_api_s_name(asked: str, expected: str):
    assert check_type(asked) == expected


@pytest.mark.parametrize(
    ("asked", "hosts"), [("v2-32", 4), ("v3-2048", 256), ("v4-16", 2), ("v5e-16", 4), ("v5p-32", 4)]
)
def test_types_with_several_hosts_are_refused(asked: str, hosts: int):
    with pytest.raises(UserError, match=f"--type={asked}: .*{hosts} hosts"):
        check_type(asked)


@pytest.mark.parametrize("asked", ["v3", "v3-", "v3-0", "v9-8", "", "a100-8"])
def test_unknown_type_is_refused(asked: str):
    with pytest.raises(UserError, match=f"--type={asked}: .*v2-8"):
        check_type(asked)


def test_types_without_tensorflow_support_are_refused():
    with pytest.raises(UserError, match=r"--type=tpu7x-8"):
        check_type("tpu7x-8")


@pytest.mark.parametrize(
    ("asked", "expected"),
    [("v2-8", "tpu-ubuntu2204-base"), ("v5e-4", "v2-alpha-tpuv5-lite"), ("v6e-8", "v2-alpha-tpuv6e")],
)
def test_each_type_has_its_runtime(asked: str, expected: str):
    assert runtime_version(check_type(asked)) == expected


def test_hosts_are_counted():
    check_hosts("--tpu=pod", 1)
    with pytest.raises(UserError, match=r"--tpu=pod: .*4 hosts"):
        check_hosts("--tpu=pod", 4)
