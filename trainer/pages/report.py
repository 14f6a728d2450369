"""The report of a comparison: one HTML file without network access, made from result.json.

`trainer.compare` writes it. Each figure on the page has its path in result.json in `data-figure` and its exact value in
`data-value`, which a test compares.
"""

from __future__ import annotations

import base64
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.pages.figures import leaves, look_up, show
from pipeline.pages.template import breakable, render_page, report_extra, trusted
from pipeline.storage.files import write_text
from trainer.comparison.findings import Findings, main_epochs, offline_online_pairs, paired_runs
from trainer.comparison.result_file import Result, Row, load_result
from trainer.pages.arm_styles import arm_key, arm_order
from trainer.pages.view_grid import VIEWS_FILE, ShownView, read_views
from trainer.targets.arms import ARMS

REPORT_FILE = "report.html"
_TEMPLATE = Path(__file__).parent / "templates" / "report.html"


def _chart_figures(result: Result, runs: Sequence[Row]) -> dict[str, tuple[Any, str]]:
    """Figures with their titles, by name; None for a figure with nothing to draw."""
    from trainer.pages import charts, cost_charts, pair_charts

    teacher = (result.get("teacher") or {}).get("top1")
    arms, pairs, numbers = result.get("arms") or [], result.get("pairs") or [], offline_online_pairs(result)
    lengths = {arm["epochs"] for arm in arms}
    patience = charts.accuracy_by_epochs(arms, result["runs"], teacher=teacher) if len(lengths) > 1 else None
    return {
        "training-loss": (
            pair_charts.training_loss(paired_runs(result, numbers)),
            "Training loss of offline and online, and their difference, against step",
        ),
        "accuracy-differences": (
            pair_charts.accuracy_differences([pairs[number] for number in numbers]),
            "Difference in accuracy of each pair, with its interval",
        ),
        "arm-differences": (
            pair_charts.accuracy_differences([p for n, p in enumerate(pairs) if n not in numbers]),
            "Difference in accuracy between arms, with its interval",
        ),
        "accuracy": (
            charts.over_time(runs, "top1", ylabel="accuracy", percent=True, teacher=teacher),
            "Accuracy against epoch",
        ),
        "agreement": (
            charts.over_time(runs, "agreement", ylabel="agreement with the teacher", percent=True),
            "Agreement with the teacher against epoch",
        ),
        "loss": (
            charts.over_time(runs, "loss", ylabel="distillation loss (nats)"),
            "Held-out distillation loss against epoch",
        ),
        "learning-rate": (charts.learning_rates(runs), "Learning rate as run against epoch"),
        "patience": (patience, "Accuracy against the length of training"),
        "seconds": (cost_charts.step_seconds(result), "Milliseconds per step, of both arms and by part"),
        "total-time": (
            cost_charts.total_time(result, runs),
            "Total time against the number of students trained",
        ),
    }


def _in_order(result: Result) -> list[int]:
    """Positions in `runs`, ordered by arm, length and seed."""
    runs = result["runs"]
    order = arm_order([run["arm"] for run in runs])
    keys = [(order.index(run["arm"]), run["epochs"], run["seed"]) for run in runs]
    return sorted(range(len(runs)), key=keys.__getitem__)


def render(result: Result, *, views: Sequence[ShownView] = ()) -> str:
    """Renders the page of a result.

    Raises:
      UserError: the packages of the extra `report` are not installed.
    """
    epochs = main_epochs(result["runs"])
    runs = [run for run in result["runs"] if run["epochs"] == epochs]
    with report_extra("the report"):
        from pipeline.pages.svg import inline_svg

        return render_page(
            _TEMPLATE,
            at=functools.partial(look_up, result),
            show=functools.partial(show, result),
            leaves=functools.partial(leaves, result),
            found=Findings.of(result),
            main_run=result["runs"].index(runs[0]),
            evidence=offline_online_pairs(result),
            order=_in_order(result),
            arms=arm_order([run["arm"] for run in result["runs"]]),
            described={name: arm.summary for name, arm in ARMS.items()},
            breakable=breakable,
            trusted=trusted,
            arm_key=lambda arm: trusted(arm_key(arm)),
            charts={
                name: trusted(inline_svg(figure, name, title=title))
                for name, (figure, title) in _chart_figures(result, runs).items()
                if figure is not None
            },
            views=[
                {"image": base64.b64encode(view.png).decode(), "width": view.size, **view.facts}
                for view in views
            ],
        )


def write_report(workdir: Path) -> Path:
    """Writes the report of a comparison from its result.json, and its views.png if it exists.

    Returns:
      Path of the report.
    """
    result = load_result(workdir)
    views = read_views(workdir / VIEWS_FILE) if (workdir / VIEWS_FILE).exists() else []
    path = workdir / REPORT_FILE
    write_text(path, render(result, views=views))
    return path
