from __future__ import annotations

import copy
from typing import Any

import pytest

from pipeline.errors import UserError
from tests.results import make_other_pair, make_pair, make_result, make_run, one_arm_result
from trainer.comparison.findings import Findings, main_epochs, offline_online_pairs, paired_runs
from trainer.comparison.summary import arm_rows, merge_results


def of_arms(*arms: str, epochs: int = 30, **changes: Any) -> dict[str, Any]:
    return make_result([make_run(arm, epochs=epochs) for arm in arms], []) | changes


def test_merged_results_hold_all_runs_and_pairs_once() -> None:
    first = make_result([make_run("offline"), make_run("online")], [make_pair()])
    other = of_arms("offline", command="other command", created="2026-11-21T00:00:00+00:00")
    merged = merge_results([first, other, first])
    assert [(run["arm"], run["epochs"]) for run in merged["runs"]] == [
        ("offline", 100),
        ("online", 100),
        ("offline", 30),
    ]
    assert merged["pairs"] == first["pairs"]
    assert merged["arms"] == arm_rows(merged["runs"])
    assert merged["command"] == f"{first['command']}\nother command"
    assert merged["created"] == other["created"]


def test_merged_cost_is_the_first_that_was_measured() -> None:
    unmeasured, measured = of_arms("fixed", cost=None), of_arms("offline")
    assert merge_results([unmeasured, measured])["cost"] == measured["cost"]


def test_results_of_another_store_or_student_are_refused() -> None:
    other = of_arms("online")
    other["store"]["digest"] = "other"
    other["student"]["name"] = "tiny"
    with pytest.raises(UserError, match=r"store\.digest: 5f1c.*other.*student\.name: small"):
        merge_results([of_arms("offline"), other])


def test_results_of_another_recipe_are_refused() -> None:
    other = of_arms("online")
    other["recipe"] |= {"warmup_steps": 7, "epochs": 30}  # may differ with the length
    merge_results([of_arms("offline"), other])
    other["recipe"]["learning_rate"] = 0.5
    with pytest.raises(UserError, match=r"recipe\.learning_rate: 0\.003.*0\.5"):
        merge_results([of_arms("offline"), other])


def test_run_with_two_different_figures_is_refused() -> None:
    first = one_arm_result()
    other = copy.deepcopy(first)
    other["runs"][0]["top1"] += 0.01
    other["runs"][0]["directory"] = "runs/again"
    with pytest.raises(UserError, match=r"runs/compare/.*runs/again"):
        merge_results([first, other])


def test_one_length_with_two_numbers_of_steps_is_refused() -> None:
    offline, online = of_arms("offline"), of_arms("online")
    online["runs"][0]["steps"] += 1
    with pytest.raises(UserError, match=str(online["runs"][0]["steps"])):
        merge_results([offline, online])


def test_summary_has_a_deviation_from_two_seeds_on() -> None:
    runs = [
        {"arm": "offline", "epochs": 10, "seed": seed, "top1": top1} for seed, top1 in ((0, 0.5), (1, 0.7))
    ]
    (row,) = arm_rows(runs)
    assert row["seeds"] == [0, 1]
    assert row["top1_mean"] == pytest.approx(0.6)
    assert row["top1_std"] == pytest.approx(0.2 / 2**0.5)
    assert row["agreement_mean"] is row["agreement_std"] is row["loss_mean"] is None
    assert arm_rows(runs[:1])[0]["top1_std"] is None


def test_main_length_is_the_one_of_most_arms() -> None:
    runs = [
        make_run(arm, epochs=epochs) for arm, epochs in (("offline", 30), ("online", 30), ("offline", 300))
    ]
    assert main_epochs(runs) == 30
    assert main_epochs(runs[1:]) == 300


def test_findings_are_of_the_worst_pair() -> None:
    runs = [make_run(arm, seed=seed) for arm in ("offline", "online") for seed in range(3)]
    result = make_result(runs, [make_pair(seed=seed) for seed in range(3)])
    result["pairs"].append(make_other_pair("fixed"))
    result["pairs"][1]["top1_difference"] = -0.004
    found = Findings.of(result)
    assert (found.state, found.largest, found.bound) == ("match", 1, (2, 0))
    assert (found.beyond, found.compared, found.agreement, found.loss) == (0, 3, 2, 2)
    assert paired_runs(result, offline_online_pairs(result)) == [
        (runs[seed], runs[3 + seed]) for seed in range(3)
    ]
