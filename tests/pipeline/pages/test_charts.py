"""pipeline.pages.charts: histograms of shares."""

from __future__ import annotations

import numpy as np
from matplotlib.patches import StepPatch

from pipeline.pages.charts import histogram
from pipeline.pages.svg import inline_svg
from tests.results import words


def test_a_histogram_shows_shares() -> None:
    figure = histogram([0.0, 1.0, 2.0, 4.0], [1, 0, 3], xlabel="nats")
    (axes,) = figure.axes
    for patch in axes.patches:
        assert isinstance(patch, StepPatch)
        np.testing.assert_array_equal(patch.get_data().values, [0.25, 0, 0.75])
    assert axes.get_xlim() == (0, 4)
    assert {"nats", "share of the sample", "0%"} <= set(words(inline_svg(figure, "entropy", title="")))


def test_an_empty_sample_has_empty_bins() -> None:
    figure = histogram([0.0, 1.0], [0], xlabel="nats")
    assert [patch.get_data().values.tolist() for patch in figure.axes[0].patches] == [[0], [0]]
