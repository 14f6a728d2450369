"""Charts of an evaluation: which classes a model confuses, and its calibration; `pipeline.pages.svg` writes them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipeline.errors.text import printable
from pipeline.pages.charts import PERCENT, make_axes
from pipeline.pages.svg import DRAWN, styled
from trainer.run.predictions import Bin

MAX_CLASSES = 250  # a matrix of more classes has cells smaller than the pixels of a screen
_NAMED_CLASSES = 12  # most whose names fit beside the matrix
_SIZE = (4.9, 4.6)  # inches; the matrix is a square
# RGB in 0..1. A picture cannot use the colors of the page; these are visible on light and on dark ground.
_CORRECT, _WRONG = (0.2, 0.55, 0.85), (0.9, 0.45, 0.1)


def confusion_pixels(counts: np.ndarray) -> np.ndarray:
    """The picture of a matrix of counts int64 [L, L]: RGBA float64 [L, L, 4].

    The opacity is the square root of a cell's share of its row, so that a few percent can be seen.
    """
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    diagonal = np.eye(len(counts), dtype=bool)[..., np.newaxis]
    return np.concatenate([np.where(diagonal, _CORRECT, _WRONG), np.sqrt(shares)[..., np.newaxis]], axis=2)


@styled
def confusion_matrix(counts: np.ndarray, names: Sequence[str], *, expected: str) -> Figure:
    """The share of the images of each class that a model predicts as each class.

    Args:
      counts: number of images by expected class (rows) and predicted class, int64 [L, L].
      names: names of the classes.
      expected: label of the rows.
    """
    figure, axes = make_axes(xlabel="prediction", ylabel=expected)
    figure.set_size_inches(*_SIZE)
    axes.imshow(confusion_pixels(counts), interpolation="none")
    axes.grid(visible=False)
    if len(counts) <= _NAMED_CLASSES:
        # Ticks write their texts again when they are drawn, after `inline_svg` has escaped control characters.
        short = [printable(name if len(name) <= 16 else f"{name[:15]}…") for name in names]
        axes.set_xticks(range(len(counts)), short)
        if max(map(len, short)) > 2:
            axes.tick_params(axis="x", labelrotation=90)
        axes.set_yticks(range(len(counts)), short)
    else:
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10], integer=True))
    return figure


@styled
def calibration_chart(bins: Sequence[Bin]) -> Figure:
    """Accuracy against confidence, with the diagonal of perfect calibration, and the share of the images in each bin."""
    figure, axes = make_axes(xlabel="confidence of the prediction", ylabel="accuracy")
    total = sum(each["images"] for each in bins)
    used = [each for each in bins if each["images"]]
    axes.bar(
        [each["low"] for each in bins],
        [each["images"] / total for each in bins],
        width=bins[0]["high"] - bins[0]["low"],
        align="edge",
        color=DRAWN["part"],
        alpha=0.3,
    )
    axes.plot([0, 1], [0, 1], color=DRAWN["ink"], linewidth=1, linestyle=(0, (1, 2.4)))
    points = np.array([(each["confidence"], each["accuracy"]) for each in used], np.float64)
    axes.plot(points[:, 0], points[:, 1], color=DRAWN["blue"], marker="o", markersize=5, clip_on=False)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PERCENT)
    return figure
