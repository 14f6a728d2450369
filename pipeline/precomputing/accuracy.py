"""The teacher's top-1 on each evaluated split, from the stored logits and the data set's labels.

Measured once, after a split is published, and kept in `eval/accuracy.json`, so that a reader of the store needs no data
set to know how good its teacher is. Informational: nothing else depends on it, and a store without it is as good.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import TypedDict

import numpy as np
from tqdm import tqdm

from pipeline.errors import DataError, UserError
from pipeline.inputs.dataset import Dataset
from pipeline.inputs.labels import UNLABELED
from pipeline.precomputing.sample import spread
from pipeline.storage.bucket import BucketDirectory, is_url
from pipeline.storage.checked_json import build, is_whole, read_json
from pipeline.storage.files import write_text
from pipeline.store.layout import ACCURACY_FILE, NOTE_LIMIT
from pipeline.store.reader import Store

# A label is read with its image: of a split with more examples, a seeded sample of so many.
SAMPLE = 50_000
_AT_ONCE = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitAccuracy:
    """How often the teacher is right on a split.

    Attributes:
      labeled: examples with a label among those looked at.
      correct: of these, with the label as the largest logit.
      unlabeled: examples without a label among those looked at.
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
        """Share of the labeled examples, 0..1; None where there are none."""
        return self.correct / self.labeled if self.labeled else None

    def text(self) -> str:
        """For people."""
        if not self.labeled:
            return "no labels"
        left_out = f" ({self.unlabeled:,} without a label left out)" if self.unlabeled else ""
        return f"{self.top1:.2%} of {self.labeled:,} images{left_out}"


class _File(TypedDict):
    spec: str
    splits: dict[str, SplitAccuracy]


def read_accuracy(store: Store) -> dict[str, SplitAccuracy]:
    """What is recorded, by evaluated split; empty for a store of an earlier version.

    Raises:
      DataError: the file is damaged, or of another store.
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
            f"{store.location}: {ACCURACY_FILE} is of spec {found['spec'][:16]!a}, this store's spec is "
            f"{store.spec.digest()[:16]}; remove it"
        )
    return {name: one for name, one in found["splits"].items() if name in store.eval_splits}


def measure_accuracy(store: Store, split: str, dataset: Dataset) -> SplitAccuracy:
    """Compares stored logits with labels.

    Raises:
      DataError: a shard, or a file of the data set, is damaged.
    """
    reader = store.eval_reader(split)
    examples = spread(range(reader.num_records), SAMPLE, seed=0, stream="accuracy")
    labeled = correct = 0
    with tqdm(
        total=len(examples), unit=" images", desc=f"top-1 on {split}", dynamic_ncols=True, leave=False
    ) as bar:
        for part in np.array_split(examples, -(-len(examples) // _AT_ONCE)):
            labels = dataset.labels(part)
            choices = reader.read(part).logits.argmax(axis=1)
            labeled += int((labels != UNLABELED).sum())
            correct += int(((labels == choices) & (labels != UNLABELED)).sum())
            bar.update(len(part))
    return SplitAccuracy(labeled=labeled, correct=correct, unlabeled=len(examples) - labeled)


def record_accuracy(
    store: Store, datasets: Mapping[str, Dataset], *, before: Callable[[], None] | None = None
) -> dict[str, SplitAccuracy]:
    """Measures what is not recorded yet, and records it; the caller holds the store's lock.

    Args:
      store: published.
      datasets: by evaluated split.
      before: see `BucketDirectory.write`.

    Returns:
      All that is recorded, by split.
    """
    known = read_accuracy(store)
    missing = [split for split in datasets if split in store.eval_splits and split not in known]
    for split in missing:
        known[split] = measure_accuracy(store, split, datasets[split])
    if missing:
        tree = {
            "spec": store.spec.digest(),
            "splits": {name: dataclasses.asdict(known[name]) for name in sorted(known)},
        }
        text = json.dumps(tree, indent=1, sort_keys=True) + "\n"
        if is_url(store.location):
            BucketDirectory(store.location).write(ACCURACY_FILE, text.encode(), before=before)
        else:
            write_text(store.path / ACCURACY_FILE, text)
    return known


def accuracy_text(found: dict[str, SplitAccuracy]) -> str:
    """One line for the summary."""
    if not found:
        return "teacher top-1: no split is evaluated"
    return "teacher top-1: " + ", ".join(f"{name} {one.text()}" for name, one in sorted(found.items()))
