"""A small file system, for tests with a full or read-only disk."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def small_disk(path: Path, *, size: int, readonly: bool = False) -> Iterator[Path]:
    """Mounts a tmpfs of `size` bytes at `path`; skips the test if this user cannot mount."""
    path.mkdir()
    options = f"size={size},{'ro' if readonly else 'rw'}"
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"mounting a small disk needs root: {done.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


def resize(disk: Path, *, size: int) -> None:
    """Changes the size of a mounted disk in bytes, and keeps its files."""
    subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)


def set_readonly(disk: Path, *, readonly: bool) -> None:
    """Makes a mounted disk read-only or writable."""
    subprocess.run(["mount", "-o", f"remount,{'ro' if readonly else 'rw'}", disk], check=True)
