"""Which directory of a store has what."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import UnpublishedError

SPEC_FILE = "spec.json"
VIEWS_SPLIT = "views"
EVAL_DIRECTORY = "eval"  # a TFDS data set of its own: the teacher's logits on evaluation crops
ACCURACY_FILE = f"{EVAL_DIRECTORY}/accuracy.json"  # the teacher's, informational
PENDING = "pending"  # directory of notes on shards that are there but not yet in the metadata
STORE_DIRECTORIES = (EVAL_DIRECTORY, PENDING, f"{EVAL_DIRECTORY}/{PENDING}")


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
