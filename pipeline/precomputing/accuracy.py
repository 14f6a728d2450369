"""Measures the teacher's top-1 on the evaluated splits, from the stored logits and the data set's labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from tqdm import tqdm

from pipeline.inputs.dataset import Dataset
from pipeline.inputs.labels import UNLABELED, ClassMatch
from pipeline.storage.bucket import BucketDirectory, is_url
from pipeline.storage.files import write_text
from pipeline.store.accuracy import SAMPLE, SplitAccuracy, accuracy_json, read_accuracy
from pipeline.store.layout import ACCURACY_FILE
from pipeline.store.reader import StoreReader
from pipeline.views.stratified import stratified_sample

_CHUNK = 256  # examples in memory


def measure_accuracy(store: StoreReader, split: str, dataset: Dataset, match: ClassMatch) -> SplitAccuracy:
    """Compares stored logits with labels, on a seeded sample of a large split: reading a label reads its image.

    Raises:
      DataError: a shard or a file of the data set is damaged.
    """
    reader = store.eval_reader(split)
    examples = stratified_sample(range(reader.num_records), SAMPLE, seed=0, stream="accuracy")
    labeled = correct = 0
    with tqdm(
        total=len(examples), unit=" images", desc=f"top-1 on {split}", dynamic_ncols=True, leave=False
    ) as bar:
        for chunk in np.array_split(examples, -(-len(examples) // _CHUNK)):
            labels = dataset.labels(chunk)
            choices = match.predict(reader.read(chunk).logits)
            labeled += int((labels != UNLABELED).sum())
            correct += int(((labels == choices) & (labels != UNLABELED)).sum())
            bar.update(len(chunk))
    return SplitAccuracy(labeled=labeled, correct=correct, unlabeled=len(examples) - labeled)


def record_accuracy(
    store: StoreReader,
    datasets: Mapping[str, Dataset],
    match: ClassMatch,
    *,
    before: Callable[[], None] | None = None,
) -> dict[str, SplitAccuracy]:
    """Measures and records the accuracy on splits for which it is not recorded; the caller holds the store's lock.

    Args:
      datasets: data set of each evaluated split.
      match: how the teacher's classes match the labels; nothing is measured if they do not.
      before: called before each attempt to write to a bucket; see `BucketDirectory.write`.

    Returns:
      All recorded accuracies by split.
    """
    if match.no_accuracy is not None:
        return {}
    known = read_accuracy(store)
    missing = [split for split in datasets if split in store.eval_splits and split not in known]
    for split in missing:
        known[split] = measure_accuracy(store, split, datasets[split], match)
    if missing:
        text = accuracy_json(store, known)
        if is_url(store.location):
            BucketDirectory(store.location).write(ACCURACY_FILE, text.encode(), before=before)
        else:
            write_text(store.path / ACCURACY_FILE, text)
    return known


def accuracy_text(found: Mapping[str, SplitAccuracy]) -> str:
    """Summary line."""
    if not found:
        return "teacher top-1: no split is evaluated"
    return "teacher top-1: " + ", ".join(f"{name} {one.text()}" for name, one in sorted(found.items()))
