"""Charts of pairs of runs: differences of their training losses and of their students' accuracies."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from pipeline.cli.units import counted
from pipeline.pages.charts import add_legend, make_axes
from pipeline.pages.svg import DRAWN, styled
from trainer.comparison.result_file import Row
from trainer.pages.arm_styles import arm_style
from trainer.pages.charts import MAX_POINTS, finite, log_y, series_of, thinned


def loss_differences(first: Row, second: Row) -> np.ndarray:
    """Absolute difference of two runs' training losses at their common logged steps: float64 [n, 2], by step."""
    ours, theirs = series_of(first.get("losses") or [], 0, 1), series_of(second.get("losses") or [], 0, 1)
    steps, left, right = np.intersect1d(ours[:, 0], theirs[:, 0], return_indices=True)
    return np.stack([steps, np.abs(ours[left, 1] - theirs[right, 1])], axis=1)


def _largest_of_bins(points: np.ndarray) -> np.ndarray:
    """The rows of [n, 2] with the largest value in each of at most `MAX_POINTS` bins of consecutive rows."""
    if len(points) <= MAX_POINTS:
        return points
    return np.array([chunk[np.argmax(chunk[:, 1])] for chunk in np.array_split(points, MAX_POINTS)])


@styled
def training_loss(pairs: Sequence[tuple[Row, Row]]) -> Figure | None:
    """Training losses of each pair and their difference against steps, on one logarithmic axis."""
    figure, axes = make_axes(xlabel="step", ylabel="distillation loss (nats)")
    differences = [loss_differences(*pair) for pair in pairs]
    for number, (pair, points) in enumerate(zip(pairs, differences, strict=True)):
        for run in pair:
            losses = thinned(series_of(run.get("losses") or [], 0, 1))
            style = arm_style(run["arm"]).line()
            axes.plot(losses[:, 0], losses[:, 1], **style, label="" if number else run["arm"])
        largest = _largest_of_bins(points[points[:, 1] > 0])
        axes.plot(largest[:, 0], largest[:, 1], color=DRAWN["muted"], linewidth=0.8, marker=".", markersize=3)
    steps = sum(map(len, differences))
    if not steps:
        return None
    log_y(axes)
    if any((points[:, 1] > 0).any() for points in differences):
        axes.lines[2].set_label("absolute difference")
    else:
        axes.set_title(f"difference: exactly 0 at all {steps:,} logged steps", fontsize=10, loc="left")
    axes.set_xlim(left=0)
    add_legend(figure, axes)
    return figure


@styled
def accuracy_differences(pairs: Sequence[Row]) -> Figure | None:
    """Difference in accuracy of each pair with its interval, in points; None if no pair has one."""
    rows = []
    for pair in pairs:
        low, high = pair.get("top1_interval") or (None, None)
        values = [100 * finite(value) for value in (pair.get("top1_difference"), low, high)]
        if np.isfinite(values).all():
            rows.append(
                (
                    f"{pair['a']} \N{MINUS SIGN} {pair['b']}\n{counted(pair['epochs'], 'epoch')}, seed {pair['seed']}",
                    values,
                )
            )
    if not rows:
        return None
    figure, axes = make_axes(xlabel="difference in accuracy (points)", ylabel="")
    figure.set_figheight(1.0 + 0.5 * max(len(rows), 2))
    axes.grid(visible=False)
    axes.grid(axis="x", color=DRAWN["rule"], linewidth=0.7)
    axes.axvline(0, color=DRAWN["ink"], linewidth=1)
    for place, (_, (value, low, high)) in enumerate(rows):
        color = DRAWN["blue"]
        axes.plot([low, high], [place, place], color=color, linewidth=1.8, marker="|", markersize=8)
        axes.plot([value], [place], color=color, marker="o", markersize=6)
    axes.set_yticks(range(len(rows)), [label for label, _ in rows])
    axes.tick_params(axis="y", length=0, labelcolor=DRAWN["ink"])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.margins(x=0.08)
    if not any(value for _, values in rows for value in values):
        axes.set_xlim(-1, 1)
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:+.3g}".replace("-", "\N{MINUS SIGN}") if value else "0")
    )
    return figure
