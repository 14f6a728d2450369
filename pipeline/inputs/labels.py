"""Labels and the accuracy that they give; examples without a label do not count. NumPy alone."""

from __future__ import annotations

import numpy as np

UNLABELED = -1  # as TFDS spells the absence of a label, such as a hidden test label


def top1(choices: np.ndarray, labels: np.ndarray) -> float | None:
    """Share of the labeled examples whose chosen class is the label, 0..1; None if no example is labeled.

    Args:
      choices: classes, int [n].
      labels: of the same examples, int [n]; `UNLABELED` where there is none.
    """
    labeled = labels != UNLABELED
    return float((choices == labels)[labeled].mean()) if labeled.any() else None
