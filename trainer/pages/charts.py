"""Charts of a comparison, for the report and for docs/results.md; `pipeline.pages.svg` writes them.

Arms differ in dash pattern and marker as well as in color, so they can be distinguished in gray print and by color-blind
readers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from pipeline.pages.charts import PERCENT, add_legend, make_axes
from pipeline.pages.figures import number_text
from pipeline.pages.svg import DRAWN, styled
from trainer.comparison.result_file import Row
from trainer.pages.arm_styles import arm_order, arm_style

MAX_POINTS = 400  # per curve; more than its pixels


def finite(value: Any) -> float:
    """The value as a float; NaN if it is no number."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else float("nan")


def thinned(points: np.ndarray) -> np.ndarray:
    """At most `MAX_POINTS` rows of [n, 2], including the last one."""
    if len(points) <= MAX_POINTS:
        return points
    return points[np.unique(np.linspace(0, len(points) - 1, MAX_POINTS).round().astype(int))]


def series_of(rows: Sequence[Any], x: Any, y: Any) -> np.ndarray:
    """Columns `x` and `y` of rows (dicts or pairs) where both are finite: float64 [n, 2], ascending in x."""
    pairs = [
        (finite(row.get(x)), finite(row.get(y)))
        if isinstance(row, dict)
        else (finite(row[x]), finite(row[y]))
        for row in rows
    ]
    points = np.array(pairs, np.float64).reshape(-1, 2)
    points = points[np.isfinite(points).all(axis=1)]
    return points[np.argsort(points[:, 0], kind="stable")]


def _epoch_of_step(run: Row) -> float:
    """Epochs per step of a run."""
    steps = finite(run.get("steps"))
    return finite(run.get("epochs")) / steps if steps else float("nan")


def _draw(axes: Axes, arm: str, series: list[np.ndarray]) -> None:
    """Draws the mean of the seeds' series, each [n, 2], at their common x, and the band of their values."""
    style, color = arm_style(arm), DRAWN[arm_style(arm).color]
    series = [points for points in series if len(points)]
    if not series:
        return
    common = series[0][:, 0]
    for points in series[1:]:
        common = np.intersect1d(common, points[:, 0])
    values = np.stack([points[np.isin(points[:, 0], common), 1] for points in series])  # [seeds, n]
    mean = thinned(np.stack([common, values.mean(axis=0)], axis=1))
    if len(series) > 1:
        band = np.isin(common, mean[:, 0])
        axes.fill_between(
            common[band],
            values.min(axis=0)[band],
            values.max(axis=0)[band],
            color=color,
            alpha=0.16,
            linewidth=0,
        )
    axes.plot(
        mean[:, 0],
        mean[:, 1],
        **style.line(),
        marker=style.marker,
        markersize=4.5,
        markevery=max(len(mean) // 6, 1),
        markeredgewidth=0,
        label=arm,
    )


@styled
def over_time(
    runs: Sequence[Row], column: str, *, ylabel: str, percent: bool = False, teacher: float | None = None
) -> Figure | None:
    """A column of the runs' evaluations against epochs of training, with one line per arm.

    Args:
      runs: Runs of the result; `history` is used.
      column: Column of the history, such as `top1`.

    Returns:
      The figure; None if there is nothing to draw.
    """
    figure, axes = make_axes(xlabel="epoch of training", ylabel=ylabel)
    for arm in arm_order([run["arm"] for run in runs]):
        series = [series_of(run.get("history") or [], "epoch", column) for run in runs if run["arm"] == arm]
        _draw(axes, arm, series)
    if not axes.lines:
        return None
    if teacher is not None:
        axes.axhline(teacher, color=DRAWN["ink"], linewidth=1, linestyle=(0, (1, 2.4)), label="teacher")
    if percent:
        axes.yaxis.set_major_formatter(PERCENT)
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    elif all((np.asarray(line.get_ydata()) > 0).all() for line in axes.lines):
        log_y(axes)
    axes.set_xlim(left=0)
    add_legend(figure, axes)
    return figure


def log_y(axes: Axes) -> None:
    """Makes the axis logarithmic, with plain numbers below two decades; leaves it linear where it would have one tick."""
    _, high = axes.get_ylim()
    lowest = min(float(np.min(line.get_ydata())) for line in axes.lines if len(np.asarray(line.get_ydata())))
    if high < 5 * lowest:
        return
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high < 100 * low:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number_text(value)))


@styled
def learning_rates(runs: Sequence[Row]) -> Figure | None:
    """The logged learning rate, with one line per arm; lines of the same schedule coincide."""
    figure, axes = make_axes(xlabel="epoch of training", ylabel="learning rate")
    for arm in arm_order([run["arm"] for run in runs]):
        run = next(run for run in runs if run["arm"] == arm)
        points = series_of(run.get("learning_rates") or [], 0, 1)
        points[:, 0] *= _epoch_of_step(run)
        _draw(axes, arm, [points[np.isfinite(points).all(axis=1)]])
    if not axes.lines:
        return None
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    add_legend(figure, axes)
    return figure


@styled
def accuracy_by_epochs(
    arms: Sequence[dict[str, Any]], runs: Sequence[Row] = (), *, teacher: float | None = None
) -> Figure | None:
    """Final accuracy against the length of training, with one line per arm.

    Args:
      arms: Arms of the result: `top1_mean`, and `top1_std` over seeds for error bars.
      runs: Runs, shown as small open points where there are two seeds or more.

    Returns:
      The figure; None without an accuracy.
    """
    figure, axes = make_axes(xlabel="epochs of training (logarithmic)", ylabel="accuracy")
    ticks: set[float] = set()
    for name in arm_order([arm["arm"] for arm in arms]):
        style, color = arm_style(name), DRAWN[arm_style(name).color]
        rows = [arm for arm in arms if arm["arm"] == name]
        points = series_of(rows, "epochs", "top1_mean")
        if not len(points):
            continue
        ticks |= set(points[:, 0])
        deviation = {finite(arm["epochs"]): finite(arm.get("top1_std")) for arm in rows}
        errors = np.nan_to_num([deviation[epochs] for epochs in points[:, 0]])
        axes.errorbar(
            points[:, 0],
            points[:, 1],
            yerr=errors if errors.any() else None,
            **style.line(),
            marker=style.marker,
            markersize=5,
            markeredgewidth=0,
            capsize=3,
            elinewidth=1.2,
            label=name,
        )
        several = {arm["epochs"] for arm in rows if len(arm.get("seeds") or []) > 1}
        each = series_of(
            [run for run in runs if run["arm"] == name and run["epochs"] in several], "epochs", "top1"
        )
        axes.plot(each[:, 0], each[:, 1], "o", markersize=3, markerfacecolor="none", markeredgecolor=color)
    if not ticks:
        return None
    if teacher is not None:
        axes.axhline(teacher, color=DRAWN["ink"], linewidth=1, linestyle=(0, (1, 2.4)), label="teacher")
    if min(ticks) > 0:
        axes.set_xscale("log")
        axes.set_xlim(min(ticks) / 1.35, max(ticks) * 1.35)
    axes.xaxis.set_major_locator(FixedLocator(sorted(ticks)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_formatter(PERCENT)
    add_legend(figure, axes)
    return figure
