"""trainer.run.predictions: calibration and confusions are compared with sums over the images one by one."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.inputs.labels import UNLABELED, ClassMatch
from trainer.run.predictions import BINS, Predictions, calibration_error

NAMES = ["ant", "bee", "cat", "dog"]
LABELS = np.array([0, 1, 2, UNLABELED, 0, 0, 3, 1])


@pytest.fixture(scope="module")
def logits() -> np.ndarray:
    return (2.5 * np.random.default_rng(0).normal(size=(len(LABELS), len(NAMES)))).astype(np.float32)


def predictions_of(
    logits: np.ndarray, labels: np.ndarray = LABELS, *, match: ClassMatch | None = None
) -> Predictions:
    """Predictions in batches of three; the teacher's logits are those of the model, mirrored."""
    made = Predictions(match=match or ClassMatch(names=NAMES), labels=labels, class_names=NAMES)
    for start in range(0, len(labels), 3):
        made.add(logits[start : start + 3], logits[start : start + 3, ::-1])
    return made


def expected_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """The sum over bins of |sum of confidence - sum of correct predictions|, per image."""
    total = 0.0
    for low in range(BINS):
        here = (confidence > low / BINS) & (confidence <= (low + 1) / BINS)
        total += abs(confidence[here].sum() - correct[here].sum())
    return total / len(confidence)


def test_calibration_is_that_of_the_labeled_images(logits: np.ndarray) -> None:
    labeled = LABELS != UNLABELED
    shares = np.exp(logits.astype(np.float64))
    shares /= shares.sum(axis=1, keepdims=True)
    confidence, correct = shares.max(axis=1)[labeled], (logits.argmax(axis=1) == LABELS)[labeled]
    found = predictions_of(logits)
    bins = found.calibration()
    assert calibration_error(bins) == pytest.approx(expected_error(confidence, correct), rel=1e-6)
    assert len(bins) == 15
    assert sum(each["images"] for each in bins) == labeled.sum()
    for each in bins:
        assert (each["confidence"] is None) == (each["accuracy"] is None) == (each["images"] == 0)
        if each["confidence"] is not None:
            assert each["low"] < each["confidence"] <= each["high"]
    np.testing.assert_array_equal(found.predicted, logits.argmax(axis=1))


@pytest.mark.parametrize(
    ("scale", "right", "error"), [(1000.0, True, 0.0), (1000.0, False, 1.0), (0.0, True, 0.75)]
)
def test_calibration_error_of_extremes(scale: float, right: bool, error: float) -> None:
    """A model that is certain, and one that gives every class the same probability but is right."""
    labels = np.zeros(5, np.int64)
    logits = np.zeros((5, 4), np.float32)
    logits[:, 0 if right else 1] = scale
    assert calibration_error(predictions_of(logits, labels).calibration()) == pytest.approx(error)


def test_confusions_are_counted(logits: np.ndarray) -> None:
    labels = np.array([0, 0, 0, 1, 1, UNLABELED, 3])
    predicted = np.array([2, 2, 1, 1, 0, 3, 3])
    found = predictions_of(np.eye(4, dtype=np.float32)[predicted], labels)
    assert found.compared_with == "label"
    counts, names = found.matrix()
    assert list(names) == NAMES
    assert counts.tolist() == [[0, 1, 2, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    rows = [tuple(each.values()) for each in found.confusions(2)]
    assert rows == [("ant", "cat", 2, 3), ("ant", "bee", 1, 3)]
    assert len(found.confusions(9)) == 3


def test_without_labels_predictions_are_compared_with_the_teachers(logits: np.ndarray) -> None:
    match = ClassMatch(names=["a", "b", "c", "d"], no_accuracy="no labels")
    found = predictions_of(logits, np.full(len(LABELS), UNLABELED), match=match)
    assert found.compared_with == "teacher"
    assert calibration_error(found.calibration()) is None
    counts, names = found.matrix()
    assert list(names) == ["a", "b", "c", "d"]
    expected = np.zeros((4, 4), int)
    for row in logits:
        expected[row[::-1].argmax(), row.argmax()] += 1
    np.testing.assert_array_equal(counts, expected)


def test_a_class_map_sums_the_probabilities_of_a_label() -> None:
    """Classes 0 and 2 stand for label 0, class 3 for label 1, and class 1 for none."""
    match = ClassMatch(names=list("wxyz"), mapped=(np.array([0, 2, 3]), np.array([0, 0, 1])))
    shares = np.array([[0.25, 0.25, 0.1, 0.4], [0.5, 0.1, 0.2, 0.2]])
    logits = np.log(shares).astype(np.float32)
    np.testing.assert_array_equal(match.predict(logits), [1, 0])
    np.testing.assert_allclose(match.confidence(logits), [0.4 / 0.75, 0.7 / 0.9], rtol=1e-6)
