"""What a store's files say is checked before it is believed: a store may come from anywhere.

Nothing in a store is code, and no file outside of it is read or written because it says so. Numbers that memory is
taken for have bounds, here or in the dataclass that holds them.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import DataError

# Of a file's text. A manifest of 99,999 shards has 19 MB.
SPEC_LIMIT, INFO_LIMIT, MANIFEST_LIMIT, NOTE_LIMIT = 1 << 20, 8 << 20, 64 << 20, 1 << 16
# Of TFDS, and nothing that is a path.
_SPLIT_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")


def read_text(path: Path, *, limit: int) -> str:
    """Text of a file of at most `limit` bytes.

    Raises:
      OSError: it is not there, is no file, or cannot be read.
      ValueError: longer, or not UTF-8.
    """
    if path.exists() and not path.is_file():  # a pipe has no end
        raise OSError(errno.EINVAL, "not a file", str(path))
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"longer than {limit:,} bytes")
    return data.decode()


def parse_json(text: str) -> Any:
    """The tree that a text is; NaN and infinities, which JSON has not, are refused.

    Raises:
      ValueError: it is not JSON, or nested deeper than Python's stack.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_json(path: Path, *, limit: int) -> Any:
    """`parse_json` of a file; see `read_text` for what is raised."""
    return parse_json(read_text(path, limit=limit))


def scalars(tree: Any, *, nested: int = 0) -> dict[str, Any]:
    """A mapping of names to strings and numbers, and to such mappings `nested` levels deep.

    Raises:
      TypeError: it is something else.
    """
    if not isinstance(tree, Mapping):
        raise TypeError(f"expected an object, got {type(tree).__name__}")
    for name, value in tree.items():
        if isinstance(value, Mapping) and nested:
            scalars(value, nested=nested - 1)
        elif not (value is None or isinstance(value, str | int | float)):
            raise TypeError(f"{name}: expected a string or a number, got {type(value).__name__}")
    return dict(tree)


def is_whole(value: object, low: int, high: int) -> bool:
    """Whether a value is a whole number, and no other type that compares like one, in `low .. high`."""
    return type(value) is int and low <= value <= high


def split_name(name: Any) -> str:
    """The name of a split, which becomes part of a file's.

    Raises:
      ValueError: it could be a path.
    """
    if not isinstance(name, str) or not _SPLIT_NAME.fullmatch(name):
        raise ValueError(f"{name!r:.100} is no name of a split")
    return name


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
