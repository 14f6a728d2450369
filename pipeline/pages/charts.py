"""Histograms, and the common style of all charts. `pipeline.pages.svg` writes them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pipeline.pages.svg import DRAWN, styled

SIZE = (4.9, 3.2)  # inches of 72 units; text of 9 units is readable at widths of 360 to 540 pixels
PERCENT = FuncFormatter(lambda value, _: f"{round(100 * value, 6):g}%")


def make_axes(*, xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    """Makes a figure with one plot in the common style."""
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
    axes.grid(axis="y", color=DRAWN["rule"], linewidth=0.7)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(DRAWN["muted"])
    axes.tick_params(colors=DRAWN["muted"], labelcolor=DRAWN["muted"], length=3)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(DRAWN["ink"])
    return figure, axes


def add_legend(figure: Figure, axes: Axes) -> None:
    """Adds a legend above the plot, with the teacher last."""
    entries = sorted(
        zip(*axes.get_legend_handles_labels(), strict=True), key=lambda entry: entry[1] == "teacher"
    )
    if entries:
        figure.legend(
            *zip(*entries, strict=True),
            loc="outside upper left",
            ncols=min(len(entries), 3),
            frameon=False,
            labelcolor=DRAWN["ink"],
            handlelength=3.4,
            columnspacing=1.4,
            borderaxespad=0.1,
        )


@styled
def histogram(
    edges: Sequence[float], counts: Sequence[int], *, xlabel: str, percent: bool = False, color: str = "blue"
) -> Figure:
    """Draws the share of a sample in each bin.

    Args:
      edges: edges of the bins, [n + 1].
      counts: counts of the bins, [n].
      xlabel: label of the x axis, with its unit.
      percent: whether the x axis shows percentages.
      color: name of a color of `pipeline.pages.svg`.
    """
    figure, axes = make_axes(xlabel=xlabel, ylabel="share of the sample")
    shares = np.asarray(counts, np.float64) / max(sum(counts), 1)
    axes.stairs(shares, edges, fill=True, color=DRAWN[color], alpha=0.35, linewidth=0)
    axes.stairs(shares, edges, color=DRAWN[color], linewidth=1.5)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(PERCENT)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    if percent:
        axes.xaxis.set_major_formatter(PERCENT)
    return figure
