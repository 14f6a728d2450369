"""A model's predictions on a split, and what only they show: its calibration, and which classes it confuses."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypedDict

import numpy as np

from pipeline.inputs.labels import UNLABELED, ClassMatch

BINS = 15


class Bin(TypedDict):
    """The images whose prediction has a confidence above `low` and up to `high`.

    `confidence` is their mean confidence and `accuracy` the share of correct predictions; both are None for an empty bin.
    """

    low: float
    high: float
    images: int
    confidence: float | None
    accuracy: float | None


class Confusion(TypedDict):
    """How many images of a class, of `total` in the split, the model predicts as another class."""

    expected: str
    predicted: str
    images: int
    total: int


@dataclasses.dataclass(kw_only=True, eq=False)
class Predictions:
    """Predictions on the images of a split, in its order, collected batch by batch.

    Attributes:
      match: how the model's classes match the labels.
      labels: labels int64 [n]; `UNLABELED` for images without one.
      class_names: names of the labels.
    """

    match: ClassMatch
    labels: np.ndarray
    class_names: Sequence[str]
    _batches: list[tuple[np.ndarray, ...]] = dataclasses.field(default_factory=list)

    def add(self, ours: np.ndarray, theirs: np.ndarray | None = None) -> None:
        """Adds the logits of a batch, float32 [b, C], of the model and of its teacher."""
        columns = [self.match.predict(ours), self.match.confidence(ours)]
        if theirs is not None:
            columns.append(self.match.predict(theirs))
        self._batches.append(tuple(columns))

    def _columns(self) -> list[np.ndarray]:
        return [np.concatenate(parts) for parts in zip(*self._batches, strict=True)]

    @property
    def predicted(self) -> np.ndarray:
        """Predicted labels, int64 [n]."""
        return self._columns()[0]

    def calibration(self) -> list[Bin]:
        """Confidence and accuracy on the labeled images, in bins of equal width.

        Guo et al. 2017 (arXiv 1706.04599), section 2, with 15 bins as in its table 1.
        """
        predicted, confidence, *_ = self._columns()
        labeled = self.labels != UNLABELED
        numbers = np.ceil(confidence[labeled] * BINS).clip(1, BINS).astype(int) - 1
        correct = (predicted == self.labels)[labeled]
        bins = []
        for number in range(BINS):
            here = numbers == number
            count = int(here.sum())
            bins.append(
                Bin(
                    low=number / BINS,
                    high=(number + 1) / BINS,
                    images=count,
                    confidence=float(confidence[labeled][here].mean()) if count else None,
                    accuracy=float(correct[here].mean()) if count else None,
                )
            )
        return bins

    @property
    def compared_with(self) -> str:
        """What predictions are compared with: `label`, or `teacher` where no image has a label."""
        return "label" if (self.labels != UNLABELED).any() else "teacher"

    @property
    def _names(self) -> Sequence[str]:
        """Names of the predicted classes."""
        return self.class_names if self.match.no_accuracy is None else self.match.names

    @property
    def num_classes(self) -> int:
        """Number of classes that can be predicted."""
        return len(self._names)

    def _pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """Expected and predicted classes, int64 [n] each."""
        columns = self._columns()
        if self.compared_with == "teacher":
            return columns[2], columns[0]
        labeled = self.labels != UNLABELED
        return self.labels[labeled], columns[0][labeled]

    def matrix(self) -> tuple[np.ndarray, Sequence[str]]:
        """Number of images by expected and by predicted class, int64 [L, L], and the names of the classes."""
        counts = np.zeros((self.num_classes, self.num_classes), np.int64)
        np.add.at(counts, self._pairs(), 1)
        return counts, self._names

    def confusions(self, most: int) -> list[Confusion]:
        """The most frequent confusions, by number of images."""
        (expected, predicted), names = self._pairs(), self._names
        totals = np.bincount(expected, minlength=len(names))
        pairs, counts = np.unique(
            np.stack([expected, predicted], axis=1)[expected != predicted], axis=0, return_counts=True
        )
        return [
            Confusion(
                expected=names[expected_class],
                predicted=names[predicted_class],
                images=int(count),
                total=int(totals[expected_class]),
            )
            for count, (expected_class, predicted_class) in sorted(
                zip(counts.tolist(), pairs.tolist(), strict=True), key=lambda row: (-row[0], row[1])
            )[:most]
        ]


def calibration_error(bins: Sequence[Bin]) -> float | None:
    """The expected calibration error: the mean difference of confidence and accuracy, by images; None without labels."""
    total = sum(each["images"] for each in bins)
    if not total:
        return None
    # Empty bins have neither.
    gaps = [each["images"] * abs((each["confidence"] or 0.0) - (each["accuracy"] or 0.0)) for each in bins]
    return sum(gaps) / total
