"""pipeline.views.policies.light: windows of a canvas."""

from __future__ import annotations

import numpy as np
from scipy import stats

from pipeline.views.policies.light import Light

VIEWS = np.array([0, 1, 2, 1000, 10**9])
SIZES = np.array([[500, 600], [375, 500], [1, 50], [40, 3], [1200, 900]])


def test_golden_boxes_of_light() -> None:
    """May change only with pipeline.store.spec.FORMAT_VERSION."""
    corners = [[26, 28], [30, 17], [25, 4], [23, 9], [32, 7]]
    boxes = Light().draw_boxes(VIEWS, seed=0, sizes=SIZES)
    assert boxes.tolist() == [[*corner, 128, 128] for corner in corners]


def test_light_windows_are_uniform() -> None:
    policy = Light(image_size=16)  # canvas 20: 5 positions a side
    boxes = policy.draw_boxes(np.arange(5000), seed=0, sizes=np.zeros((5000, 2)))
    counts = np.bincount(boxes[:, 0] * 5 + boxes[:, 1], minlength=25)
    assert len(counts) == 25
    assert stats.chisquare(counts).pvalue > 1e-3


def test_boxes_refer_to_the_canvas() -> None:
    sizes = np.array([[500, 600], [7, 5]])
    frames = Light(image_size=16).renderer().prepared_shapes(sizes)
    assert frames.tolist() == [[20, 20], [20, 20]]
    np.testing.assert_array_equal(Light(image_size=16).renderer().prepared_shapes(sizes), frames)
