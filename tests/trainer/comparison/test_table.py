"""trainer.comparison.table: the figures of a comparison for a terminal."""

from __future__ import annotations

from tests import results
from trainer.comparison.table import comparison_table


def test_table_has_a_row_per_arm_and_a_line_per_pair() -> None:
    result = results.full_result()
    lines = comparison_table(result).splitlines()
    assert lines[0].split() == ["arm", "epochs", "runs", "top-1", "(test)", "agreement"]
    assert "3 (seeds 0, 1, 2)" in lines[1]
    for line, arm in zip(lines[1:], result["arms"], strict=False):
        assert line.split()[0] == arm["arm"]
        assert f"{arm['top1_mean']:.2%}" in line
    pairs = [line for line in lines if " - " in line]
    assert len(pairs) == len(result["pairs"])
    assert f"{result['cost']['saving']:+.0%}" in lines[-2]
    assert "256 rows for 128 views" in lines[-1]  # padding of the teacher batch


def test_comparison_without_labels_has_no_accuracy() -> None:
    result = results.unlabeled_result()
    text = comparison_table(result)
    assert f"{result['eval_images']:,} unlabeled images of {result['eval_images']:,}" in text
    assert text.count("n/a") == len(result["arms"])


def test_equal_runs_are_reported_as_bit_equal() -> None:
    result = results.full_result()
    pair = result["pairs"][0] | {"largest_loss_difference": 0.0, "weights_distance_relative": 0.0}
    result |= {"pairs": [pair], "cost": {"seconds_a_step": None}}
    assert "bit-equal" in comparison_table(result).splitlines()[-1]
