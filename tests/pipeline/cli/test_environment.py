"""pipeline.cli.environment: versions, and the CPUs and memory that this process may use."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from pipeline.cli import environment


def test_versions_are_those_installed() -> None:
    found = environment.versions()
    assert found["python"] == platform.python_version()
    assert (found["numpy"], found["tensorflow"]) == (np.__version__, tf.__version__)
    assert "not installed" not in found.values()


def test_a_missing_package_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Beam is in the trainer's image."""
    monkeypatch.setitem(environment._VERSIONED, "no-such-package", ("no-such-package",))
    assert environment.versions()["no-such-package"] == "not installed"


def test_another_distribution_of_a_package_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As TensorFlow for TPUs, which is a package of its own."""
    monkeypatch.setitem(environment._VERSIONED, "tensorflow", ("no-such-package", "numpy"))
    assert environment.versions()["tensorflow"] == np.__version__


@pytest.mark.parametrize(
    ("version", "inherited", "expected"),
    [("2.15.1", "1", None), ("2.15.1", None, None), ("2.16.0", None, "1"), ("2.21.0", "0", "1")],
)
def test_keras_2_is_chosen_by_the_version_of_tensorflow(
    monkeypatch: pytest.MonkeyPatch, version: str, inherited: str | None, expected: str | None
) -> None:
    kept = {name: value for name, value in os.environ.items() if name != environment.KERAS_VARIABLE}
    monkeypatch.setattr(os, "environ", kept | ({environment.KERAS_VARIABLE: inherited} if inherited else {}))
    monkeypatch.setattr(environment.metadata, "version", lambda _: version)
    environment.use_keras_2()
    assert os.environ.get(environment.KERAS_VARIABLE) == expected


@pytest.mark.parametrize(("inherited", "expected"), [(None, "true"), ("false", "false")])
def test_commands_take_gpu_memory_as_they_need_it(inherited: str | None, expected: str) -> None:
    """Of a process without TensorFlow: the variable also reaches child processes."""
    code = (
        "import os, sys, types; command = sys.modules['command'] = types.ModuleType('command'); "
        f"command.main = lambda argv: print(os.environ['{environment.GROWTH_VARIABLE}']); "
        "from pipeline.cli.main import run_module; run_module('command')"
    )
    kept = {name: value for name, value in os.environ.items() if name != environment.GROWTH_VARIABLE}
    given = {environment.GROWTH_VARIABLE: inherited} if inherited else {}
    done = subprocess.run(
        [sys.executable, "-c", code], env=kept | given, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == expected


def test_tensorflow_reads_the_variable() -> None:
    """No GPU is here to see the effect."""
    name = environment.GROWTH_VARIABLE.encode()
    libraries = [
        path.read_bytes() for path in Path(tf.sysconfig.get_lib()).glob("libtensorflow_framework.so*")
    ]
    assert any(name in library for library in libraries)


def test_the_processor_has_the_name_from_the_kernel() -> None:
    name = environment.processor()
    assert name
    if "model name" in (text := Path("/proc/cpuinfo").read_text()):
        assert f": {name}\n" in text


def test_affinity_mask_bounds_the_cores() -> None:
    before = os.sched_getaffinity(0)
    assert environment.usable_cpus() <= len(before)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert environment.usable_cpus() == 1
    finally:
        os.sched_setaffinity(0, before)


def cgroup(root: Path, line: str, files: dict[str, str]) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(f"{line}\n")
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


@pytest.mark.parametrize(
    ("line", "files"),
    [
        ("0::/", {"cpu.max": "50000 100000", "memory.max": "1000"}),
        ("0::/a/b", {"a/cpu.max": "max 100000", "a/b/cpu.max": "50000 100000", "a/memory.max": "1000"}),
        ("0::/a/b", {"a/cpu.max": "50000 100000", "a/memory.max": "1000", "a/b/memory.max": "max"}),
        ("0::/of/the/host", {"cpu.max": "100000 100000", "memory.max": "1000"}),
        ("0::/../outside", {"cpu.max": "100000 100000", "memory.max": "1000"}),
        (
            "4:cpu,cpuacct:/a\n5:memory:/a",
            {
                "cpu/cpu.cfs_quota_us": "100000",
                "cpu/cpu.cfs_period_us": "100000",
                "memory/a/memory.limit_in_bytes": "1000",
            },
        ),
    ],
    ids=["container", "innermost", "outer", "path_of_the_host", "path_outside", "version_1"],
)
def test_limits_of_a_cgroup_apply(tmp_path: Path, line: str, files: dict[str, str]) -> None:
    root = cgroup(tmp_path, line, files)
    assert environment.usable_cpus(root) == 1
    assert environment.usable_memory(root) == 1000


def test_without_limits_it_is_the_whole_machine(tmp_path: Path) -> None:
    unlimited = {"cpu.max": "max 100000", "memory.max": "max", "cpu/cpu.cfs_quota_us": "-1"}
    for root in (tmp_path / "no_cgroups", cgroup(tmp_path / "unlimited", "0::/", unlimited)):
        assert environment.usable_cpus(root) == len(os.sched_getaffinity(0))
        assert environment.usable_memory(root) == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
