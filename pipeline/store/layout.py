"""Which directory of a store has what."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pipeline.errors import UnpublishedError
from pipeline.storage.bucket import is_url

SPEC_FILE = "spec.json"
VIEWS_SPLIT = "views"
EVAL_DIRECTORY = "eval"  # a TFDS data set of its own: the teacher's logits on evaluation crops
ACCURACY_FILE = f"{EVAL_DIRECTORY}/accuracy.json"  # the teacher's, informational
PENDING = "pending"  # directory of notes on shards that are there but not yet in the metadata
STORE_DIRECTORIES = (EVAL_DIRECTORY, PENDING, f"{EVAL_DIRECTORY}/{PENDING}")


# Of a file's text. A manifest of 99,999 shards has 19 MB.
SPEC_LIMIT, INFO_LIMIT, MANIFEST_LIMIT, NOTE_LIMIT = 1 << 20, 8 << 20, 64 << 20, 1 << 16
# Of TFDS, and nothing that is a path.
_SPLIT_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")


def below(split: str) -> str:
    """Where a split's shards live, relative to the store: in itself, or in `eval`."""
    return "" if split == VIEWS_SPLIT else EVAL_DIRECTORY


def split_directory(store: str | Path, split: str) -> Path:
    """`below` a store on a file system."""
    return Path(store, below(split))


def missing_store(store: str | Path) -> UnpublishedError:
    """The error for a place without a store."""
    return UnpublishedError(
        f"--store={store}: no {SPEC_FILE} there; write a store with `python -m pipeline.precompute --store={store}`"
    )


def check_store(place: str) -> None:
    """Checks that a store of this machine is there; one in a bucket is checked when it is opened.

    Raises:
      UserError: there is none.
    """
    if not is_url(place) and not Path(place, SPEC_FILE).exists():
        raise missing_store(place)


def split_name(name: Any) -> str:
    """The name of a split, which becomes part of a file's.

    Raises:
      ValueError: it could be a path.
    """
    if not isinstance(name, str) or not _SPLIT_NAME.fullmatch(name):
        raise ValueError(f"{name!r:.100} is no name of a split")
    return name
