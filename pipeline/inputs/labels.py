"""Labels, and the accuracy over labeled examples."""

from __future__ import annotations

import numpy as np

UNLABELED = -1  # TFDS's value for a missing label, such as a hidden test label


def top1(choices: np.ndarray, labels: np.ndarray) -> float | None:
    """Top-1 accuracy over the labeled examples, 0..1; None if no example is labeled.

    Args:
      choices: predicted classes, int [n].
      labels: labels, int [n]; `UNLABELED` for examples without one.
    """
    labeled = labels != UNLABELED
    return float((choices == labels)[labeled].mean()) if labeled.any() else None
