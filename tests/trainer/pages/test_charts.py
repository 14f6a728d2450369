from __future__ import annotations

from pipeline.pages.svg import inline_svg
from tests import results
from tests.results import words
from trainer.pages import charts


def test_no_chart_without_data() -> None:
    runs = results.sparse_result()["runs"]
    assert charts.over_time(runs, "top1", ylabel="accuracy") is None
    assert charts.learning_rates(runs) is None
    assert charts.accuracy_by_epochs([], []) is None


def test_run_with_one_evaluation_is_drawn() -> None:
    run = results.make_run("offline")
    run["history"] = run["history"][:1]
    figure = charts.over_time([run], "top1", ylabel="accuracy", percent=True)
    assert figure is not None
    assert "offline" in words(inline_svg(figure, "accuracy", title=""))
