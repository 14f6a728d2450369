"""Labels, the teacher's classes that are compared with them, and the accuracy over labeled examples."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from pipeline.errors import DataError
from pipeline.store.classes import Classes

UNLABELED = -1  # TFDS's value for a missing label, such as a hidden test label


class LabeledImages(Protocol):
    """What is needed of a `pipeline.inputs.dataset.Dataset`."""

    name: str
    num_classes: int
    class_names: list[str]

    def labels(self, examples: np.ndarray) -> np.ndarray:
        """Labels of examples int64 [n]: int64 [n]."""


def top1(choices: np.ndarray, labels: np.ndarray) -> float | None:
    """Top-1 accuracy over the labeled examples, 0..1; None if no example is labeled.

    Args:
      choices: predicted classes, int [n].
      labels: labels, int [n]; `UNLABELED` for examples without one.
    """
    labeled = labels != UNLABELED
    return float((choices == labels)[labeled].mean()) if labeled.any() else None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ClassMatch:
    """How the teacher's C classes, which are the student's too, match the labels of a data set.

    Attributes:
      names: names of the C classes; those of the data set, or numbers, where the store has none.
      no_accuracy: why accuracy cannot be computed; None if it can.
      mapped: teacher classes int64 [m] and their classes of the data set int64 [m]; None if the classes are the same.
      note: a line for the user on accuracy, if it differs from a comparison of C classes with C labels.
    """

    names: Sequence[str]
    no_accuracy: str | None = None
    mapped: tuple[np.ndarray, np.ndarray] | None = None
    note: str | None = None

    def predict(self, logits: np.ndarray) -> np.ndarray:
        """The class of each row of logits [n, C], as a label: int64 [n].

        With a class map, it is the label of the mapped class with the largest logit, as ImageNet's subsets are evaluated: classes
        without a label are never predicted. Without accuracy, it is the class itself.
        """
        if self.mapped is None:
            return logits.argmax(axis=1)
        classes, labels = self.mapped
        return labels[logits[:, classes].argmax(axis=1)]

    def confidence(self, logits: np.ndarray) -> np.ndarray:
        """The probability at T = 1 of each prediction of `predict`, float64 [n]; with a class map, among the mapped classes."""
        if self.mapped is not None:
            logits = logits[:, self.mapped[0]]
        shares = np.exp(logits - logits.max(axis=1, keepdims=True), dtype=np.float64)
        if self.mapped is None:
            return 1.0 / shares.sum(axis=1)  # the share of the largest logit is 1
        labels = self.mapped[1]
        same = labels == labels[logits.argmax(axis=1)][:, np.newaxis]
        confidence: np.ndarray = np.where(same, shares, 0.0).sum(axis=1) / shares.sum(axis=1)
        return confidence

    def label_of(self, teacher_class: int) -> int | None:
        """The label that a teacher class stands for; None if it stands for none."""
        if self.no_accuracy is not None:
            return None
        if self.mapped is None:
            return teacher_class
        classes, labels = self.mapped
        place = int(np.searchsorted(classes, teacher_class))
        return int(labels[place]) if place < len(classes) and classes[place] == teacher_class else None

    def labels(self, dataset: LabeledImages, examples: np.ndarray) -> np.ndarray:
        """Labels of examples int64 [n] that predictions are compared with: int64 [n], all `UNLABELED` without accuracy."""
        if self.no_accuracy is not None:
            return np.full(len(examples), UNLABELED)
        return dataset.labels(examples)


def match_classes(dataset: LabeledImages, num_classes: int, classes: Classes) -> ClassMatch:
    """Matches the teacher's classes with a data set's.

    Args:
      dataset: data set, opened with the label feature of `classes`.
      num_classes: C.
      classes: what the store records.

    Raises:
      DataError: the class map has a class that the data set has not.
    """
    names = classes.names or (dataset.class_names if dataset.num_classes == num_classes else None)
    names = names or [f"class {number}" for number in range(num_classes)]
    sizes = f"the teacher has {num_classes:,} classes, {dataset.name} has {dataset.num_classes or 'no'}"
    if not dataset.num_classes:
        return _without_accuracy(names, f"{sizes} labels")
    if classes.class_map is not None:
        mapped = np.array(classes.class_map, np.int64).T
        covered = len(np.unique(mapped[1]))
        if (last := int(mapped[1].max())) >= dataset.num_classes:
            raise DataError(
                f"the class map of the store names class {last:,}, but {dataset.name} has {dataset.num_classes:,} classes; run the "
                "precompute again with its --class_map"
            )
        note = (
            f"accuracy by class map: {mapped.shape[1]:,} of the teacher's {num_classes:,} classes stand for {covered:,} of the "
            f"{dataset.num_classes:,} classes of {dataset.name}"
        )
        if missing := dataset.num_classes - covered:
            note += f"; {missing:,} have no teacher class, and their images count as wrong"
        return ClassMatch(names=names, mapped=(mapped[0], mapped[1]), note=note)
    if dataset.num_classes != num_classes:
        return _without_accuracy(names, f"{sizes}; --class_map=FILE of the precompute maps them")
    if classes.names is not None and (different := _difference(classes.names, dataset.class_names)):
        return _without_accuracy(names, f"{different}; --class_map=FILE of the precompute maps them")
    return ClassMatch(names=names)


def _without_accuracy(names: Sequence[str], reason: str) -> ClassMatch:
    return ClassMatch(names=names, no_accuracy=reason, note=f"no accuracy is computed: {reason}")


def _difference(teacher: Sequence[str], dataset: Sequence[str]) -> str | None:
    """The first class with another name; None if there is none, or if the data set has only numbers."""
    if list(dataset) == [str(number) for number in range(len(dataset))]:
        return None
    for number, (ours, theirs) in enumerate(zip(teacher, dataset, strict=True)):
        if ours != theirs:
            return f"class {number:,} is {ours!r:.100} for the teacher and {theirs!r:.100} for the data set"
    return None
