"""What a result was made with: versions of the libraries, and the processor."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path

_VERSIONED = ("view-distill", "tensorflow", "tensorflow-datasets", "array-record", "apache-beam", "numpy")


def versions() -> dict[str, str]:
    """Python's and the packages' that a result may depend on, by name."""
    found = {"python": platform.python_version()}
    for package in _VERSIONED:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def processor() -> str:
    """The processor's name, as Linux tells it, else as Python does."""
    try:
        with Path("/proc/cpuinfo").open() as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
