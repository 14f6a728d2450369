"""Files that are whole or absent: written aside, synced, and renamed into place."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import DataError

TEMPORARY = ".tmp-"
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)  # of file systems without hard links, such as FAT


def sync_path(path: Path) -> None:
    """Makes a file's or directory's content survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """`sync_path` for a directory and everything below it, so that a rename never outruns its content."""
    for parent, _, names in os.walk(directory):
        for name in names:
            sync_path(Path(parent, name))
        sync_path(Path(parent))


@contextlib.contextmanager
def publish(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """Gives a temporary name beside `path`; what is written there appears at `path` if nothing is raised.

    Raises:
      FileExistsError: something is at `path`, and `replace` is False.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        yield temporary
        sync_path(temporary)
        if replace:
            temporary.replace(path)
        else:
            _link(temporary, path)
        sync_path(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _link(temporary: Path, path: Path) -> None:
    """Gives a file a second name, atomically; never in the place of another file."""
    try:
        path.hardlink_to(temporary)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        path.touch(exist_ok=False)  # of several writers, one creates the file that is replaced
        try:
            temporary.replace(path)
        except BaseException:
            path.unlink()
            raise


def write_text(path: Path, text: str) -> None:
    """Writes a text file, atomically."""
    with publish(path) as temporary:
        temporary.write_text(text)


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file, atomically."""
    with publish(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, tree: Any) -> None:
    """Writes a JSON file, atomically; NaN and infinities, which JSON has not, are a ValueError."""
    write_text(path, json.dumps(tree, indent=2, allow_nan=False) + "\n")


def remove_temporaries(directory: Path) -> None:
    """Removes what writers that died left behind; only the holder of the store's lock may."""
    for path in directory.glob(f"{TEMPORARY}*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def put_directory(fresh: Path, path: Path) -> None:
    """Renames a directory to `path`, where nothing is, once all of it is on the disk."""
    sync_tree(fresh)
    fresh.rename(path)
    sync_path(path.parent)


def replace_directory(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes a directory aside and puts it in the place of the one at `path`, which is whole or absent."""
    fresh, old = path.with_name(f".tmp-{path.name}"), path.with_name(f".old-{path.name}")
    for leftover in (fresh, old):
        remove_directory(leftover)
    write(fresh)
    if path.exists():
        sync_tree(fresh)  # before the old one goes
        path.rename(old)
    put_directory(fresh, path)
    remove_directory(old)


def remove_directory(path: Path) -> None:
    """Removes a directory if it is there."""
    if path.exists():
        shutil.rmtree(path)


def check_links(store: Path, *below: str) -> None:
    """Refuses a store in which a symbolic link leads out of it.

    Args:
      store: its directory, which may itself be a link.
      below: directories in it that have files of the store, such as `eval`.

    Raises:
      DataError: names the link and where it leads.
    """
    root = store.resolve()
    for directory in (store, *(store / name for name in below)):
        if not directory.is_dir():
            continue
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.is_symlink() and not (target := Path(entry.path).resolve()).is_relative_to(root):
                    raise DataError(
                        f"{entry.path}: a link to {target}, outside of the store; nothing is read or written there: put the "
                        "file itself into the store"
                    )
