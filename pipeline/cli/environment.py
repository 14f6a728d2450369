"""Versions and processor for provenance, and the CPUs and memory that this process may use."""

from __future__ import annotations

import contextlib
import math
import os
import platform
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

KERAS_VARIABLE = "TF_USE_LEGACY_KERAS"
GROWTH_VARIABLE = "TF_FORCE_GPU_ALLOW_GROWTH"
# Name of a package to its distributions, of which one is installed.
_VERSIONED = {
    "tensorflow": ("tensorflow", "tensorflow-tpu", "tensorflow-cpu"),
    **{
        name: (name,)
        for name in ("view-distill", "tensorflow-datasets", "array-record", "apache-beam", "numpy")
    },
}


def use_keras_2() -> None:
    """Makes `tf.keras` Keras 2, also in child processes; to be called before TensorFlow is imported.

    TensorFlow 2.16 and later come with Keras 3, and take Keras 2 from the package tf-keras if this variable is set. Earlier versions
    come with Keras 2, and with an inherited value of the variable they would look for tf-keras.
    """
    version = _version("tensorflow")
    if version is not None and tuple(map(int, version.split(".")[:2])) >= (2, 16):
        os.environ[KERAS_VARIABLE] = "1"
    else:
        os.environ.pop(KERAS_VARIABLE, None)


def grow_device_memory() -> None:
    """Makes TensorFlow take GPU memory as it needs it, also in child processes; to be called before it uses a device.

    By default, the first process takes nearly all of it, so that a second one on the same GPU fails, such as a parallel run or a
    worker of the precompute. A value that the user has set stays. A variable, because `tf.config.experimental.set_memory_growth`
    would have to come first in every process, and import TensorFlow there.
    """
    os.environ.setdefault(GROWTH_VARIABLE, "true")


def _version(package: str) -> str | None:
    for distribution in _VERSIONED[package]:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(distribution)
    return None


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results may depend on, by name."""
    return {"python": platform.python_version()} | {
        package: _version(package) or "not installed" for package in _VERSIONED
    }


def processor() -> str:
    """Name of the processor, from Linux or else from Python."""
    try:
        with Path("/proc/cpuinfo").open() as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def usable_cpus(root: Path = Path("/")) -> int:
    """Number of cores that this process may use, from its affinity mask and the CPU quotas of its cgroups, rounded up.

    Args:
      root: root of the file system, for tests.
    """
    count = len(os.sched_getaffinity(0))
    quotas = [text.split() for text in _limits("cpu", "cpu.max", root)]  # "200000 100000" or "max 100000"
    v1 = (_limits("cpu", f"cpu.cfs_{name}_us", root) for name in ("quota", "period"))
    quotas += [list(pair) for pair in zip(*v1, strict=False)]
    for quota, period in quotas:
        if quota not in ("max", "-1"):
            count = min(count, math.ceil(int(quota) / int(period)))
    return max(count, 1)


def usable_memory(root: Path = Path("/")) -> int:
    """Bytes of memory that this process may use: the machine's memory or the smallest limit of its cgroups.

    Args:
      root: root of the file system, for tests.
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in ("memory.max", "memory.limit_in_bytes"):
        limits += [int(text) for text in _limits("memory", name, root) if text != "max"]
    return min(limits)


def _limits(controller: str, name: str, root: Path) -> Iterator[str]:
    """Texts of a limit in this process's cgroup and its parents, for cgroup version 2 or 1."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / (controller if controllers else "")
        # In a container, the path may be that of the host, which is not mounted. The base is the container's own.
        directory = base / path.lstrip("/") if ".." not in path else base
        for place in (directory, *directory.parents):
            with contextlib.suppress(OSError):
                yield (place / name).read_text().strip()
            if place == base:
                break
