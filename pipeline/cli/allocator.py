"""Tunes glibc's memory allocator for TensorFlow on CPUs."""

from __future__ import annotations

import contextlib
import ctypes
import os

from pipeline.cli.environment import usable_cpus

# mallopt's parameters, from malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_MOST_CPUS = 8  # one arena has one lock


def keep_freed_memory() -> None:
    """Lets this process reuse the memory that it frees, instead of returning it to the system.

    TensorFlow allocates the output of each op. By default glibc maps a large one and unmaps it when it is freed, so that every page is
    faulted in again: with an EfficientNet-Lite0 at 128 x 128 pixels, 1,100 page faults per image and 14 ms of CPU time instead of 9.5.
    `tests/benchmarks/allocator.py` measures it.

    Nothing is changed if the environment configures malloc, on more than 8 cores (not measured), or without glibc.
    """
    configured = any(name.startswith("MALLOC_") for name in os.environ) or "GLIBC_TUNABLES" in os.environ
    if configured or usable_cpus() > _MOST_CPUS:
        return
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_ARENA_MAX, 1)  # memory of other arenas is unmapped whatever the thresholds
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, -1)  # never
