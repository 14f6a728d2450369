"""Charts of the costs of a comparison: time per step, and total time against the number of students."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipeline.pages.charts import add_legend, make_axes
from pipeline.pages.figures import number_text
from pipeline.pages.svg import DRAWN, styled
from trainer.comparison.result_file import Result, Row
from trainer.pages.arm_styles import ARM_STYLES, arm_style
from trainer.pages.charts import finite

_BARS = {
    "online": ("online", ""),
    "offline": ("offline", "///"),
    "teacher": ("teacher alone", "..."),
    "student": ("student alone", "\\\\\\"),
    "input": ("input alone", "xxx"),
}


def _seconds_a_step(result: Result) -> dict[str, float]:
    """The measured seconds per step, by name."""
    seconds = (result.get("cost") or {}).get("seconds_a_step") or {}
    return {name: value for name in _BARS if np.isfinite(value := finite(seconds.get(name)))}


@styled
def step_seconds(result: Result) -> Figure | None:
    """Bars of milliseconds per step: both arms, then the parts measured alone; None if nothing was measured."""
    seconds = _seconds_a_step(result)
    if not seconds:
        return None
    figure, axes = make_axes(xlabel="milliseconds per step", ylabel="")
    figure.set_figheight(0.7 + 0.5 * len(seconds))
    axes.grid(visible=False)
    names = list(seconds)[::-1]
    for place, name in enumerate(names):
        label, hatch = _BARS[name]
        color = DRAWN[arm_style(name).color if name in ARM_STYLES else "part"]
        value = 1e3 * seconds[name]
        axes.barh(
            place,
            value,
            height=0.62,
            facecolor="none" if hatch else color,
            edgecolor=color,
            linewidth=1.2,
            hatch=hatch,
            label=label,
        )
        axes.annotate(
            number_text(value),
            (value, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            color=DRAWN["ink"],
        )
    axes.set_yticks(range(len(names)), [_BARS[name][0] for name in names])
    axes.tick_params(axis="y", length=0, labelcolor=DRAWN["ink"])
    axes.margins(x=0.14)
    axes.set_xlim(left=0)
    return figure


def _unit(seconds: float) -> tuple[float, str]:
    """Seconds and name of a suitable unit for a duration."""
    return (3600.0, "hours") if seconds >= 7200 else (60.0, "minutes") if seconds >= 120 else (1.0, "seconds")


@styled
def total_time(result: Result, runs: Sequence[Row]) -> Figure | None:
    """Total time against the number of students, with one precompute for all of them offline.

    Args:
      result: Result with the seconds of the precompute and of a step, and with the break-even.
      runs: Runs of one length, which determines the steps.

    Returns:
      The figure; None if a part was not measured.
    """
    seconds = _seconds_a_step(result)
    precompute = finite((result.get("cost") or {}).get("precompute_seconds"))
    steps = finite(runs[0].get("steps"))
    if not np.isfinite([precompute, steps]).all() or not {"online", "offline"} <= set(seconds):
        return None
    break_even = finite(result["cost"].get("break_even_students"))
    known = bool(np.isfinite(break_even))
    most = max(4.0, min(2 * break_even, 1e4)) if known else 4.0
    students = np.array([0.0, most])
    once = {"online": 0.0, "offline": precompute}
    each = {name: steps * seconds[name] for name in once}
    unit, name = _unit(max(once[arm] + most * each[arm] for arm in once))
    figure, axes = make_axes(xlabel="students trained", ylabel=f"total time ({name})")
    for arm, label in (("online", "online"), ("offline", "offline, with the precompute")):
        style = arm_style(arm)
        axes.plot(
            students,
            (once[arm] + students * each[arm]) / unit,
            **style.line(),
            label=label,
        )
    if known and break_even <= most:
        height = break_even * each["online"] / unit
        axes.plot([break_even], [height], "o", color=DRAWN["ink"], markersize=5)
        axes.annotate(
            f"break-even at {number_text(break_even)}",
            (break_even, height),
            xytext=(9, -9),
            textcoords="offset points",
            color=DRAWN["ink"],
        )
    axes.set_xlim(0, most)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    add_legend(figure, axes)
    return figure
