"""pipeline.pages.svg: figures with the colors of a page."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from pipeline import pages
from pipeline.pages.charts import histogram
from pipeline.pages.svg import COLORS, inline_svg
from tests.results import words


def make_figure() -> Figure:
    return histogram([0.0, 0.5, 1.0], [1, 1], xlabel="share of the image", percent=True)


def test_inline_figures_use_css_variables_and_unique_ids() -> None:
    svgs = [inline_svg(make_figure(), name, title='<"title">') for name in ("first", "second")]
    assert svgs[0] == inline_svg(make_figure(), "first", title='<"title">')  # the same bytes each time
    for svg in svgs:
        assert not re.search(r"#[0-9a-f]{6}\b", svg)
        assert set(re.findall(r"var\(--([\w-]+)\)", svg)) <= set(COLORS)
        assert "<metadata" not in svg
        assert {"0%", "100%", "share of the image"} <= set(words(svg))
    first, second = ({*re.findall(r' id="([^"]+)"', svg)} for svg in svgs)
    assert first
    assert not first & second


def contrast(color: str, ground: str) -> float:
    """Contrast ratio of WCAG."""

    def luminance(text: str) -> float:
        values = np.array([int(text[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    high, low = sorted((luminance(color), luminance(ground)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1])
def test_colors_have_enough_contrast(theme: int) -> None:
    css = (Path(pages.__file__).parent / "templates" / "page.css").read_text()
    colors = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", css.split(":root {")[1 + theme].split("}")[0]))
    if theme == 0:
        assert COLORS.items() <= colors.items()
    for name in colors.keys() - {"rule", "ground", "raised", "part"}:
        assert contrast(colors[name], colors["ground"]) >= 4.5, name
    assert contrast(colors["muted"], colors["raised"]) >= 4.5
    assert contrast(colors["part"], colors["ground"]) >= 3
