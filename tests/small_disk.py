"""A file system of a few megabytes, for tests of what happens when it is full or cannot be written."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def small_disk(path: Path, *, size: int, readonly: bool = False) -> Iterator[Path]:
    """Mounts a tmpfs of `size` bytes at `path`; skips the test where this user may not mount."""
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
    """Gives a mounted disk another size, in bytes; what is on it stays."""
    subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)


def set_readonly(disk: Path, *, readonly: bool) -> None:
    """Lets a mounted disk be written, or not."""
    subprocess.run(["mount", "-o", f"remount,{'ro' if readonly else 'rw'}", disk], check=True)
