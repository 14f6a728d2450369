"""Files and directories that appear whole or not at all: written under a temporary name, synchronized to disk, and renamed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import DataError

TEMPORARY = ".tmp-"  # begins the temporary names
_REPLACED = ".old-"
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)  # on file systems without hard links, such as FAT


def _sync(path: Path) -> None:
    """Writes a file's or directory's content to the disk, so that it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """Yields a temporary path; the file written there appears at `path` if no exception is raised.

    Several processes may write the same `path` at once.

    Args:
      replace: whether an existing file is replaced.

    Raises:
      FileExistsError: something exists at `path`, and `replace` is False.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        yield temporary
        _sync(temporary)
        if replace:
            temporary.replace(path)
        else:
            _rename_to_new(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _rename_to_new(temporary: Path, path: Path) -> None:
    """Gives a file its final name, atomically, and never replaces another file."""
    try:
        path.hardlink_to(temporary)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        path.touch(exist_ok=False)  # only one of several writers creates this file, which it then replaces
        try:
            temporary.replace(path)
        except BaseException:
            path.unlink()
            raise


@contextlib.contextmanager
def atomic_directory(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yields a temporary path; the directory made there appears at `path` if no exception is raised.

    One process at a time may write the same `path`, so callers hold a lock. The temporary name is always the same: the next
    writer removes what a killed one left behind.

    Args:
      path: final path; its parent exists.
      replace: whether an existing directory is replaced. For a moment there is none at `path`.

    Raises:
      OSError: a directory that is not empty exists at `path`, and `replace` is False.
    """
    fresh, old = (path.with_name(f"{prefix}{path.name}") for prefix in (TEMPORARY, _REPLACED))
    remove_directory(fresh)
    remove_directory(old)
    try:
        yield fresh
        move_directory(fresh, path, replaced=old if replace else None)
        remove_directory(old)
    finally:
        remove_directory(fresh)


def move_directory(fresh: Path, path: Path, *, replaced: Path | None = None) -> None:
    """Renames a directory to `path` once all of its content is on the disk.

    Args:
      fresh: directory on the same file system.
      replaced: where a directory at `path` is moved first; by default none may exist.
    """
    for parent, _, names in os.walk(fresh):
        for name in names:
            _sync(Path(parent, name))
        _sync(Path(parent))
    if replaced is not None and path.exists():
        path.rename(replaced)
    fresh.rename(path)
    _sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text)


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file atomically."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, tree: Any) -> None:
    """Writes a JSON file atomically.

    Raises:
      ValueError: NaN or an infinity, which JSON does not have.
    """
    write_text(path, json.dumps(tree, indent=2, allow_nan=False) + "\n")


def remove_temporaries(directory: Path) -> None:
    """Removes temporary files that killed writers left behind. Only the holder of the directory's lock may call it."""
    for path in directory.glob(f"{TEMPORARY}*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def remove_directory(path: Path) -> None:
    """Removes a directory if it exists."""
    if path.exists():
        shutil.rmtree(path)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_links(store: Path, *below: str) -> None:
    """Refuses a store that contains a symbolic link to a place outside of it.

    Args:
      store: directory of the store, which may itself be a link.
      *below: subdirectories with files of the store, such as `eval`.

    Raises:
      DataError: names the link and its target.
    """
    root = store.resolve()
    for directory in (store, *(store / name for name in below)):
        if not directory.is_dir():
            continue
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.is_symlink() and not (target := Path(entry.path).resolve()).is_relative_to(root):
                    raise DataError(
                        f"{entry.path}: symbolic link to {target}, outside the store, which is neither read nor written; copy "
                        "the file itself into the store"
                    )
