"""A figure of views, a row per view: image with box, crop, partner's crop, mixed view, likeliest classes."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter

from pipeline.pages.views import View
from pipeline.store.softmax import log_softmax

_BLUE, _ORANGE = "#0067b0", "#c75000"
_ROW, _WIDTH = 2.1, 11.0  # inches


class ViewFigure(Figure):
    """A figure that a notebook displays as the value of a cell, whatever its backend."""

    def _repr_png_(self) -> bytes:
        with io.BytesIO() as file:
            self.savefig(file, format="png")
            return file.getvalue()


def draw_views(views: Sequence[View], class_names: Sequence[str], label_names: Sequence[str]) -> Figure:
    """Draws one row per stored view.

    Args:
      views: the views.
      class_names: names of the classes of the logits.
      label_names: names of the classes of the labels.
    """
    figure = ViewFigure(figsize=(_WIDTH, _ROW * max(len(views), 1)), layout="constrained")
    grid = figure.subplots(max(len(views), 1), 5, squeeze=False, width_ratios=[1, 1, 1, 1, 1.2])
    for view, axes in zip(views, grid, strict=False):
        _draw_view(view, axes, class_names, label_names)
    return figure


def _draw_view(
    view: View, axes: Sequence[Axes], class_names: Sequence[str], label_names: Sequence[str]
) -> None:
    label = "no label" if view.label is None else label_names[view.label]
    pictures = {
        f"view {view.index}: {label}": view.source,
        "crop, mirrored" if view.flip else "crop": view.crop,
        "partner": view.partner_crop,
        f"{view.ratio:.2f} crop + {1 - view.ratio:.2f} partner": view.mixed / 255,
    }
    for place, (title, pixels) in zip(axes, pictures.items(), strict=False):
        place.imshow(pixels, interpolation="nearest")
        place.set_title(title, fontsize=9, parse_math=False)
        place.set_axis_off()
    y, x, height, width = view.box
    axes[0].add_patch(
        Rectangle((x - 0.5, y - 0.5), width, height, fill=False, edgecolor=_ORANGE, linewidth=2)
    )
    probability = np.exp(log_softmax(np.asarray(view.logits), 1.0))
    likeliest = np.argsort(-probability, kind="stable")[:5].tolist()
    _draw_classes([class_names[number] for number in likeliest], probability[likeliest], axes[-1])


def _draw_classes(names: Sequence[str], probability: np.ndarray, axes: Axes) -> None:
    axes.barh(range(len(names)), probability, color=_BLUE, alpha=0.4)
    for place, name in enumerate(names):
        axes.text(0.02, place, name, va="center", fontsize=9, parse_math=False)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.tick_params(labelsize=8)
    axes.set_yticks([])
    axes.invert_yaxis()
    axes.set_title("teacher, T = 1", fontsize=9)
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
