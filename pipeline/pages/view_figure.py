"""A figure of views, a row per view: image with box, crop, partner's crop, mixed view, likeliest classes."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter

_BLUE, _ORANGE = "#0067b0", "#c75000"
_ROW, _WIDTH = 2.1, 11.0  # inches


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What is drawn of one view.

    Attributes:
      title: names the view.
      source: image that the box refers to, uint8 [H, W, 3].
      box: y, x, height, width in pixels of it.
      crop, partner: uint8 [S, S, 3].
      flipped: whether the crop is mirrored.
      mixed: float32 [S, S, 3] in 0..255.
      ratio: weight of the crop in it.
      likely: names of the likeliest classes with their probabilities, likeliest first.
    """

    title: str
    source: np.ndarray
    box: tuple[int, ...]
    crop: np.ndarray
    flipped: bool
    partner: np.ndarray
    mixed: np.ndarray
    ratio: float
    likely: Sequence[tuple[str, float]]


class ViewFigure(Figure):
    """A figure that a notebook displays as the value of a cell, whatever its backend."""

    def _repr_png_(self) -> bytes:
        with io.BytesIO() as file:
            self.savefig(file, format="png")
            return file.getvalue()


def draw_views(rows: Sequence[Row]) -> Figure:
    """Draws one row per view."""
    figure = ViewFigure(figsize=(_WIDTH, _ROW * max(len(rows), 1)), layout="constrained")
    grid = figure.subplots(max(len(rows), 1), 5, squeeze=False, width_ratios=[1, 1, 1, 1, 1.2])
    for row, axes in zip(rows, grid, strict=False):
        _draw_row(row, axes)
    return figure


def _draw_row(row: Row, axes: Sequence[Axes]) -> None:
    pictures = {
        row.title: row.source,
        "crop, mirrored" if row.flipped else "crop": row.crop,
        "partner": row.partner,
        f"{row.ratio:.2f} crop + {1 - row.ratio:.2f} partner": row.mixed / 255,
    }
    for place, (title, pixels) in zip(axes, pictures.items(), strict=False):
        place.imshow(pixels, interpolation="nearest")
        place.set_title(title, fontsize=9, parse_math=False)
        place.set_axis_off()
    y, x, height, width = row.box
    axes[0].add_patch(
        Rectangle((x - 0.5, y - 0.5), width, height, fill=False, edgecolor=_ORANGE, linewidth=2)
    )
    _draw_classes(row.likely, axes[-1])


def _draw_classes(likely: Sequence[tuple[str, float]], axes: Axes) -> None:
    places = range(len(likely))
    axes.barh(places, [probability for _, probability in likely], color=_BLUE, alpha=0.4)
    for place, (name, _) in zip(places, likely, strict=True):
        axes.text(0.02, place, name, va="center", fontsize=9, parse_math=False)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.tick_params(labelsize=8)
    axes.set_yticks([])
    axes.invert_yaxis()
    axes.set_title("teacher, T = 1", fontsize=9)
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
