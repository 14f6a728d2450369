"""The page of an evaluation: its figures, a picture of the confusions, and the calibration. It needs no network.

Each figure on the page has its path in the result in `data-figure` and its exact value in `data-value`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.pages.figures import join, look_up, show
from pipeline.pages.svg import inline_svg
from pipeline.pages.template import render_page, trusted
from pipeline.storage.files import write_text
from trainer.pages.evaluation_charts import MAX_CLASSES, calibration_chart, confusion_matrix
from trainer.run.predictions import Predictions

_TEMPLATE = Path(__file__).parent / "templates" / "evaluation.html"
_EXPECTED = {"label": "label", "teacher": "prediction of the teacher"}


def _draw_charts(figures: Mapping[str, Any], predictions: Predictions, *, number: int) -> dict[str, str]:
    """Charts of a split by name; none of a matrix of too many classes, or of a calibration without labels."""
    charts = {}
    if predictions.num_classes <= MAX_CLASSES:
        counts, names = predictions.matrix()
        figure = confusion_matrix(counts, names, expected=_EXPECTED[figures["compared_with"]])
        charts["confusions"] = inline_svg(figure, f"confusions-{number}", title="Confusion matrix")
    if figures["calibration_error"] is not None:
        figure = calibration_chart(figures["calibration"])
        charts["calibration"] = inline_svg(
            figure, f"calibration-{number}", title="Accuracy against confidence"
        )
    return {name: trusted(chart) for name, chart in charts.items()}


def render_evaluation(result: Mapping[str, Any], predictions: Mapping[str, Predictions]) -> str:
    """HTML of the page.

    Args:
      result: the result of `trainer.evaluate`.
      predictions: predictions by split.
    """
    splits = result["evaluation"]
    return render_page(
        _TEMPLATE,
        at=functools.partial(look_up, result),
        show=functools.partial(show, result),
        splits=[
            {
                "name": split,
                "path": join("evaluation", split),
                "figures": figures,
                "charts": _draw_charts(figures, predictions[split], number=number),
                "classes": predictions[split].num_classes,
            }
            for number, (split, figures) in enumerate(splits.items())
        ],
    )


def write_evaluation_page(
    result: Mapping[str, Any], predictions: Mapping[str, Predictions], path: Path
) -> None:
    """Writes the page; see `render_evaluation`."""
    write_text(path, render_evaluation(result, predictions))
