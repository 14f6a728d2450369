"""Names and places of the files in a store."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.errors import UnpublishedError, UserError
from pipeline.storage.bucket import is_url
from pipeline.storage.files import TEMPORARY
from pipeline.storage.lock import LOCK_FILE

SPEC_FILE = "spec.json"
VIEWS_SPLIT = "views"
EVAL_DIRECTORY = "eval"  # a TFDS data set with the teacher's logits on evaluation crops
ACCURACY_FILE = f"{EVAL_DIRECTORY}/accuracy.json"  # top-1 of the teacher on evaluation crops; informational
CLASSES_FILE = (
    "classes.json"  # what the classes are called and how labels are compared with them; informational
)
PENDING = "pending"  # directory of notes on finished shards that are not published yet
STORE_DIRECTORIES = (EVAL_DIRECTORY, PENDING, f"{EVAL_DIRECTORY}/{PENDING}")


# Size limits of files, in bytes. A manifest of 99,999 shards has 19 MB.
SPEC_LIMIT, INFO_LIMIT, MANIFEST_LIMIT, NOTE_LIMIT = 1 << 20, 8 << 20, 64 << 20, 1 << 16
CLASSES_LIMIT = 64 << 20
# A split name of TFDS that is not a path.
_SPLIT_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")


def below(split: str) -> str:
    """Directory of a split's shards, relative to the store."""
    return "" if split == VIEWS_SPLIT else EVAL_DIRECTORY


def split_directory(store: str | Path, split: str) -> Path:
    """Path of the directory of a split's shards."""
    return Path(store, below(split))


def missing_store(store: str | Path) -> UnpublishedError:
    """The error for a location without a store."""
    there = not is_url(str(store)) and Path(store).is_dir()
    names = sorted(path.name for path in Path(store).iterdir()) if there else []
    rest = (
        f", got a directory with {names[0]}"
        if names
        else f"; write one with `python -m pipeline.precompute --store={store}`"
    )
    return UnpublishedError(f"`store`={store}: has no {SPEC_FILE}, expected a store{rest}")


def check_leftovers(location: str, names: Iterable[str]) -> None:
    """Checks that a location without a spec has nothing but what a run leaves that dies before it writes the spec.

    Args:
      location: the location, for the error.
      names: names of the files there.

    Raises:
      UserError: it has other files.
    """
    own = (LOCK_FILE, f"{TEMPORARY}{SPEC_FILE}")
    if foreign := sorted(name for name in names if not name.startswith(own)):
        raise UserError(
            f"`store`={location}: the directory is neither a store nor empty ({foreign[0]}, ...); name another directory"
        )


def check_store_or_empty(location: str) -> None:
    """Checks early that a directory of this machine is a store, empty or missing.

    Raises:
      UserError: it has other content.
    """
    path = Path(location)
    if not is_url(location) and path.is_dir() and not (path / SPEC_FILE).exists():
        check_leftovers(location, (entry.name for entry in path.iterdir()))


def check_store(place: str) -> None:
    """Checks early that a store on this machine exists. A store in a bucket is checked when it is opened.

    Raises:
      UserError: there is no store.
    """
    if not is_url(place) and not Path(place, SPEC_FILE).exists():
        raise missing_store(place)


def split_name(name: Any) -> str:
    """Validates the name of a split, which becomes part of a file name.

    Raises:
      ValueError: the name is not valid.
    """
    if not isinstance(name, str) or not _SPLIT_NAME.fullmatch(name):
        raise ValueError(f"{name!r:.100} is not a split name")
    return name
