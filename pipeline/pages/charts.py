"""What all charts have in common, and histograms; `pipeline.pages.svg` writes them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pipeline.pages.svg import DRAWN, styled

SIZE = (4.9, 3.2)  # inches of 72 units: text of 9 units reads at a phone's 360 pixels and at 540
PERCENT = FuncFormatter(lambda value, _: f"{round(100 * value, 6):g}%")


def make_axes(*, xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    """A figure with one plot, in the style of all charts."""
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
    """Above the plot, where it hides nothing; the teacher last."""
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
    edges: Sequence[float], counts: Sequence[int], *, xlabel: str, percent: bool = False, colour: str = "blue"
) -> Figure:
    """Shares of a sample by bin.

    Args:
      edges: of the bins, one more than there are.
      counts: of each bin.
      xlabel: with its unit.
      percent: whether the axis is of shares.
      colour: name of a colour of `pipeline.pages.svg`.
    """
    figure, axes = make_axes(xlabel=xlabel, ylabel="share of the sample")
    shares = np.asarray(counts, np.float64) / max(sum(counts), 1)
    axes.stairs(shares, edges, fill=True, color=DRAWN[colour], alpha=0.35, linewidth=0)
    axes.stairs(shares, edges, color=DRAWN[colour], linewidth=1.5)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(PERCENT)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    if percent:
        axes.xaxis.set_major_formatter(PERCENT)
    return figure
