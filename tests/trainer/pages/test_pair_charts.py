"""trainer.pages.pair_charts: charts of runs that differ and of runs that are equal."""

from __future__ import annotations

import numpy as np

from pipeline.pages.svg import inline_svg
from tests import results
from tests.results import words
from trainer.comparison.findings import offline_online_pairs, paired_runs
from trainer.pages import pair_charts


def test_loss_difference_is_taken_at_common_steps() -> None:
    first = {"losses": [[0, 1.0], [2, 0.5], [4, 0.25]]}
    second = {"losses": [[4, 0.5], [2, 0.5], [3, 9.0]]}
    np.testing.assert_array_equal(pair_charts.loss_differences(first, second), [[2, 0], [4, 0.25]])


def test_different_losses_are_drawn_with_their_difference() -> None:
    result = results.full_result()
    figure = pair_charts.training_loss(paired_runs(result, offline_online_pairs(result)))
    assert figure is not None
    assert {"offline", "online", "absolute difference"} <= set(words(inline_svg(figure, "loss", title="")))


def test_equal_losses_have_a_title_instead_of_a_difference() -> None:
    (run, other) = (results.make_run(arm) for arm in ("offline", "online"))
    other["losses"] = run["losses"]
    figure = pair_charts.training_loss([(run, other)])
    assert figure is not None
    shown = words(inline_svg(figure, "loss", title=""))
    assert any(f"{len(run['losses']):,} logged steps" in text for text in shown)
    assert "absolute difference" not in shown


def test_every_interval_is_drawn() -> None:
    pairs = results.full_result()["pairs"]
    figure = pair_charts.accuracy_differences(pairs)
    assert figure is not None
    (axes,) = figure.axes
    drawn = [
        line.get_xdata() for line in axes.lines if len(line.get_xdata()) == 2 and line.get_marker() == "|"
    ]
    np.testing.assert_allclose(drawn, 100 * np.array([pair["top1_interval"] for pair in pairs]))


def test_no_chart_without_data() -> None:
    sparse = results.sparse_result()
    run = sparse["runs"][0]
    assert pair_charts.training_loss([]) is None
    assert pair_charts.training_loss([(run, run)]) is None
    assert pair_charts.accuracy_differences(sparse["pairs"]) is None
