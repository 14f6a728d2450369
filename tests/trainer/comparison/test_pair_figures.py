"""trainer.comparison.pair_figures: figures of pairs and costs against their definitions."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.comparison.pair_figures import (
    Curve,
    cost_figures,
    loss_figures,
    prediction_figures,
    weight_figures,
)


def curve(steps: list[int], values: list[float]) -> Curve:
    return Curve(np.array(steps), np.array(values))


def test_losses_are_compared_at_common_steps():
    a = curve([1, 2, 3, 5], [4.0, 3.0, 2.0, 1.0])
    b = curve([2, 3, 4, 5], [3.5, 2.5, 9.0, 1.0])
    assert loss_figures(a, b) == {
        "largest_loss_difference": 0.5,
        "largest_loss_difference_step": 2,
        "mean_loss": 2.0,
    }
    assert loss_figures(a, a)["largest_loss_difference"] == 0
    assert set(loss_figures(a, curve([7], [1.0])).values()) == {None}


def test_weights_distance_is_the_norm_over_all_weights():
    a = {"kernel": np.array([[3.0, 0.0]], np.float32), "bias": np.array([4.0], np.float32)}
    b = {"kernel": np.array([[0.0, 0.0]], np.float32), "bias": np.array([0.0], np.float32)}
    found = weight_figures(a, b)
    assert found == {
        "weights_distance": 5.0,
        "weights_distance_relative": 1.0,
        "weights_largest_difference": 4.0,
    }
    assert set(weight_figures(a, a).values()) == {0.0}
    with pytest.raises(ValueError, match="different networks"):
        weight_figures(a, {"kernel": b["kernel"]})


def test_thinned_curve_keeps_its_ends():
    long = curve(list(range(1, 5001)), [float(n) for n in range(1, 5001)])
    points = long.thinned(2000)
    assert len(points) == 2000
    assert points[0] == [1, 1.0]
    assert points[-1] == [5000, 5000.0]
    assert len({step for step, _ in points}) == 2000
    assert curve([3, 4], [1.0, 2.0]).thinned(2000) == [[3, 1.0], [4, 2.0]]


def test_bootstrap_interval_matches_resampled_images():
    generator = np.random.default_rng(1)
    labels = generator.integers(0, 5, 400).astype(np.int32)
    a = np.where(generator.random(400) < 0.8, labels, 0).astype(np.int32)
    b = np.where(generator.random(400) < 0.7, labels, 0).astype(np.int32)
    found = prediction_figures(a, b, labels)
    right_a, right_b = a == labels, b == labels
    assert found["agreement"] == (a == b).mean()
    assert found["top1_difference"] == pytest.approx(right_a.mean() - right_b.mean())
    # By definition: images are drawn with replacement, the same ones for both students.
    rows = generator.integers(0, 400, (4000, 400))
    resampled = right_a[rows].mean(axis=1) - right_b[rows].mean(axis=1)
    np.testing.assert_allclose(found["top1_interval"], np.quantile(resampled, [0.025, 0.975]), atol=0.006)
    assert prediction_figures(a, b, labels) == found  # seeded
    assert prediction_figures(a, a, labels)["top1_interval"] == [0.0, 0.0]


def test_unlabeled_images_count_for_agreement_only():
    labels = np.array([0, 1, -1, -1, 2], np.int32)
    a, b = np.array([0, 1, 2, 2, 0], np.int32), np.array([0, 0, 2, 1, 0], np.int32)
    found = prediction_figures(a, b, labels)
    assert found["agreement"] == 3 / 5
    assert found["top1_difference"] == 1 / 3
    none = prediction_figures(a, b, np.full(5, -1, np.int32))
    assert (none["agreement"], none["top1_difference"], none["top1_interval"]) == (3 / 5, None, None)


def test_break_even_is_precompute_seconds_over_saved_seconds():
    seconds = {"teacher": 3.0, "student": 1.0, "input": 0.5, "offline": 1.0, "online": 4.0}
    found = cost_figures(seconds, batch_size=10, teacher_rows=10, steps=100, precompute_passes=1000)
    assert found["saving"] == 3.0
    assert found["limit"] == 3.0
    assert found["precompute_seconds"] == pytest.approx(100 * 3.5)
    assert found["break_even_students"] == pytest.approx(100 * 3.5 / (100 * 3.0))
    assert found["teacher_in_step"] == 3.0
    # The teacher pads ten views to 40 rows. The precompute has no padding.
    padded = cost_figures(seconds, batch_size=10, teacher_rows=40, steps=100, precompute_passes=1000)
    assert padded["precompute_seconds"] == pytest.approx(1000 * 3.0 / 40 + 100 * 0.5)
    free = cost_figures(
        {**seconds, "online": 1.0}, batch_size=10, teacher_rows=10, steps=100, precompute_passes=1000
    )
    assert free["break_even_students"] is None
