"""The teacher's top-1 on the evaluated splits, as `eval/accuracy.json` of a store records it.

The file is informational: nothing depends on it, and a store without it is complete. With it, a reader of the store needs
no data set to know how accurate the teacher is.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import TypedDict

from pipeline.errors import DataError, UserError
from pipeline.storage.checked_json import build, is_whole, read_json
from pipeline.store.layout import ACCURACY_FILE, NOTE_LIMIT
from pipeline.store.reader import StoreReader

SAMPLE = 50_000  # largest number of examples per split


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitAccuracy:
    """Counts of the teacher's correct answers on a split.

    Attributes:
      labeled: number of examples with a label.
      correct: number of these whose label has the largest logit.
      unlabeled: number of examples without a label.
    """

    labeled: int
    correct: int
    unlabeled: int = 0

    def __post_init__(self) -> None:
        counts = is_whole(self.labeled, 0, SAMPLE) and is_whole(self.correct, 0, self.labeled)
        if not (counts and is_whole(self.unlabeled, 0, SAMPLE)):
            raise UserError(
                f"accuracy {self.correct!r:.100} of {self.labeled!r:.100}, {self.unlabeled!r:.100} unlabeled: expected counts"
            )

    @property
    def top1(self) -> float | None:
        """Share of correct answers on labeled examples, 0..1; None without labels."""
        return self.correct / self.labeled if self.labeled else None

    def text(self) -> str:
        """Text for the terminal."""
        if not self.labeled:
            return "no labels"
        left_out = f" ({self.unlabeled:,} without a label left out)" if self.unlabeled else ""
        return f"{self.top1:.2%} of {self.labeled:,} images{left_out}"


class _File(TypedDict):
    spec: str
    splits: dict[str, SplitAccuracy]


def read_accuracy(store: StoreReader) -> dict[str, SplitAccuracy]:
    """Recorded accuracy per evaluated split; empty if nothing is recorded.

    Raises:
      DataError: the file is damaged or belongs to another store.
    """
    path = store.path / ACCURACY_FILE
    try:
        found = build(_File, read_json(path, limit=NOTE_LIMIT))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, UserError) as error:
        raise DataError(f"{store.location}: {ACCURACY_FILE} is damaged ({error}); remove it") from error
    if found["spec"] != store.spec.digest():
        raise DataError(
            f"{store.location}: {ACCURACY_FILE} belongs to spec {found['spec'][:16]!a}, this store's spec is "
            f"{store.spec.digest()[:16]}; remove it"
        )
    return {name: one for name, one in found["splits"].items() if name in store.eval_splits}


def accuracy_json(store: StoreReader, accuracy: Mapping[str, SplitAccuracy]) -> str:
    """Text of `eval/accuracy.json`."""
    splits = {name: dataclasses.asdict(accuracy[name]) for name in sorted(accuracy)}
    tree = {"spec": store.spec.digest(), "splits": splits}
    return json.dumps(tree, indent=1, sort_keys=True) + "\n"
