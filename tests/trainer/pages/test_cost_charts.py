"""trainer.pages.cost_charts: time per step, and break-even."""

from __future__ import annotations

import numpy as np

from pipeline.pages.svg import inline_svg
from tests import results
from tests.results import words
from trainer.pages import cost_charts


def test_unknown_break_even_is_not_drawn() -> None:
    result = results.full_result()
    result["cost"]["break_even_students"] = None
    figure = cost_charts.total_time(result, result["runs"])
    assert figure is not None
    assert "break-even" not in inline_svg(figure, "total-time", title="")


def test_lines_cross_at_the_break_even() -> None:
    result = results.full_result()
    cost, steps = result["cost"], result["runs"][0]["steps"]
    seconds = cost["seconds_a_step"]
    saved = steps * (seconds["online"] - seconds["offline"])
    cost["break_even_students"] = cost["precompute_seconds"] / saved
    figure = cost_charts.total_time(result, result["runs"])
    assert figure is not None
    online, offline, point = figure.axes[0].lines[:3]
    (even,), (height,) = point.get_data()
    for line in (online, offline):
        np.testing.assert_allclose(np.interp(even, *line.get_data()), height)
    assert f"break-even at {even:.3g}" in words(inline_svg(figure, "total-time", title=""))


def test_bars_have_the_measured_length() -> None:
    result = results.full_result()
    figure = cost_charts.step_seconds(result)
    assert figure is not None
    widths = {bar.get_label(): bar[0].get_width() for bar in figure.axes[0].containers}
    seconds = result["cost"]["seconds_a_step"]
    assert widths["teacher alone"] == 1e3 * seconds["teacher"]
    assert widths["offline"] == 1e3 * seconds["offline"]
    assert len(widths) == len(seconds)


def test_labels_are_plain_numbers() -> None:
    result = results.full_result()
    result["cost"]["seconds_a_step"] |= {"online": 1.6534, "student": 1.0, "input": 0.9996}
    figure = cost_charts.step_seconds(result)
    assert figure is not None
    shown = words(inline_svg(figure, "seconds", title=""))
    assert {"1,653", "1,000"} <= set(shown)
    assert not [word for word in shown if "e+" in word]


def test_no_chart_without_a_measurement() -> None:
    sparse = results.sparse_result()
    assert cost_charts.step_seconds(sparse) is None
    assert cost_charts.total_time(sparse, sparse["runs"]) is None
