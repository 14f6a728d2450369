"""pipeline.cli.allocator: memory that was freed is used again."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pipeline.cli.allocator import _MOST_CPUS
from pipeline.cli.environment import usable_cpus

# 512 pages of 4 KB, allocated and freed 100 times in a thread other than the main one.
FAULTS = """
import resource, threading
import numpy as np
from pipeline.cli.allocator import keep_freed_memory
keep_freed_memory()
def work():
    np.ones(1 << 21, np.uint8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(100):
        np.ones(1 << 21, np.uint8)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


def faults(**variables: str) -> int:
    """Page faults of 100 allocations in a process with these environment variables."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], env=clean | variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(usable_cpus() > _MOST_CPUS, reason="changes nothing on this many cores")
def test_freed_memory_is_used_again() -> None:
    assert faults() < 4_096


def test_settings_of_the_user_stay() -> None:
    assert faults(MALLOC_MMAP_THRESHOLD_="65536") > 40_000
