"""pipeline.plan: estimates from given and from measured rates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import UserError
from pipeline.plan import main
from pipeline.precomputing.planning import Rates, Workload, make_plan, plan_text
from pipeline.precomputing.worker import PrecomputeJob, ShardWorker
from pipeline.store.reader import StoreReader
from tests import stores

WORKLOAD = Workload(
    dataset="flowers:1.0.0",
    num_examples=1000,
    num_classes=100,
    epochs=36,
    eval_views=4000,
    views_per_shard=5000,
    codec="topk:7",
    temperature=10.0,
)


def plan_of(argv: list[str], tmp_path: Path) -> dict[str, Any]:
    assert main([*argv, f"--json={tmp_path / 'plan.json'}"]) == 0
    plan: dict[str, Any] = json.loads((tmp_path / "plan.json").read_text())
    return plan


def test_hours_and_break_even_follow_from_the_rates() -> None:
    plan = make_plan(WORKLOAD, Rates(teacher=2.0, precompute=1.0, measured=False), students=5, workers=3)
    assert plan["views"] == 36_000
    assert plan["teacher_hours"] == pytest.approx(40_000 / 2 / 3600)
    assert plan["precompute_hours"] == pytest.approx(40_000 / 3600)
    assert plan["wall_hours"] == pytest.approx(40_000 / 3 / 3600)
    assert plan["online_teacher_hours"] == pytest.approx(5 * 36_000 / 2 / 3600)
    # A student online costs 18,000 s of the teacher, the precompute 40,000 s.
    assert plan["break_even_students"] == 3
    assert plan["saved_teacher_hours"] == pytest.approx((5 * 18_000 - 40_000) / 3600)
    assert plan["shards"]["count"] == 8
    assert plan["shards"]["seconds_each"] == 5000
    assert plan["shards"]["views_per_shard_in_ten_minutes"] == 600


def test_a_precompute_at_the_rate_of_the_teacher_pays_with_the_first_student() -> None:
    rates = Rates(teacher=7.0, precompute=7.0, measured=False)
    workload = Workload(**(vars(WORKLOAD) | {"eval_views": 0}))
    plan = make_plan(workload, rates, students=1, workers=100)
    assert plan["break_even_students"] == 1
    assert plan["saved_teacher_hours"] == pytest.approx(0)
    assert plan["wall_hours"] == pytest.approx(plan["precompute_hours"] / 8)  # no more workers than shards


def test_bytes_of_each_codec_that_fits() -> None:
    rates = Rates(teacher=1.0, precompute=1.0, measured=False)
    codecs = make_plan(WORKLOAD, rates, students=1, workers=1)["codecs"]
    assert list(codecs) == ["float32", "bfloat16", "float16", "int8", "topk:10", "topk:7"]
    # Seven shards of 5,000 views and one of 1,000; of 132 bytes a record, in blocks of 64 KiB, and two blocks for the file.
    assert codecs["int8"]["bytes_a_view"] * 36_000 == (7 * (11 + 2) + (3 + 2)) * 65_536
    # And a shard of 4,000 evaluation crops; of 56 bytes.
    assert codecs["topk:7"]["bytes"] == (7 * (5 + 2) + (1 + 2) + (4 + 2)) * 65_536
    assert "mean_kl" not in codecs["int8"]


def test_smaller_shards_are_recommended_if_there_are_fewer_shards_than_workers() -> None:
    rates = Rates(teacher=1.0, precompute=1.0, measured=False)
    workload = Workload(**(vars(WORKLOAD) | {"views_per_shard": 10**6}))
    assert "--views_per_shard=4500 " in plan_text(make_plan(workload, rates, students=1, workers=8))
    assert "--views_per_shard=18000 " in plan_text(make_plan(workload, rates, students=1, workers=1))
    assert "same time" not in plan_text(make_plan(WORKLOAD, rates, students=1, workers=8))


def test_more_shards_than_a_store_can_have_are_refused() -> None:
    workload = Workload(**(vars(WORKLOAD) | {"epochs": 10**6, "views_per_shard": 1000}))
    with pytest.raises(UserError, match=r"`views_per_shard`=1000: .*1000000"):
        make_plan(workload, Rates(teacher=1.0, precompute=1.0, measured=False), students=1, workers=1)


def test_given_rates_need_neither_data_set_nor_teacher(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [
        "--num_examples=1281167",
        "--num_classes=1000",
        "--epochs=300",
        "--teacher_rate=20",
        "--workers=8",
    ]
    plan = plan_of(argv, tmp_path)
    assert (plan["views"], plan["temperature"], plan["rates"]["measured"]) == (384_350_100, 10, False)
    assert plan["wall_hours"] == pytest.approx(384_350_100 / 20 / 8 / 3600)
    out = capsys.readouterr().out
    assert "float16" in out
    assert "<- --codec" in out
    assert "--views_per_shard=12000 " in out
    assert "pays for itself with student 1, " in out


def test_given_rates_for_a_data_set(data_dir: Path, tmp_path: Path) -> None:
    argv = [
        f"--dataset={stores.DATASET}",
        f"--data_dir={data_dir}",
        "--teacher_rate=20",
        "--precompute_rate=10",
    ]
    plan = plan_of([*argv, "--epochs=3", "--eval_splits=test", "--students=1"], tmp_path)
    assert (plan["num_examples"], plan["num_classes"], plan["eval_views"]) == (17, 5, 7)
    assert plan["break_even_students"] == 3
    assert plan["saved_teacher_hours"] < 0


def test_rates_and_fidelity_are_measured(
    data_dir: Path,
    teacher_path: Path,
    published_store: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = stores.Asked(data_dir, teacher_path, tmp_path / "none")
    flags = [
        flag
        for flag in asked.flags("--calibrate_seconds=0.2", "--codec=topk:3")
        if not flag.startswith(("--runner", "--store"))
    ]
    plan = plan_of(flags, tmp_path)
    assert plan["rates"]["measured"]
    assert plan["rates"]["teacher"] >= plan["rates"]["precompute"] > 0
    assert (plan["views"], plan["eval_views"]) == (51, 7)
    assert not (tmp_path / "none").exists()  # nothing is written but the plan
    cost = StoreReader(published_store).views.manifest.fidelity()
    assert plan["codecs"]["float16"]["mean_kl"] == pytest.approx(cost["mean_kl"], rel=0.7)
    assert plan["codecs"]["float32"]["mean_kl"] == 0
    assert plan["codecs"]["topk:3"]["mean_kl"] > plan["codecs"]["int8"]["mean_kl"]
    out, err = capsys.readouterr()
    assert "measured here" in out
    assert "measuring for 0.2 s" in err


def test_calibration_uses_input_buffer_bytes(
    data_dir: Path, teacher_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(worker: ShardWorker, *, seconds: float) -> tuple[Rates, np.ndarray]:
        jobs.append(worker.job)
        return Rates(teacher=1.0, precompute=1.0, measured=True), np.zeros((1, stores.CLASSES), np.float32)

    jobs: list[PrecomputeJob] = []
    monkeypatch.setattr("pipeline.precomputing.planning.calibrate", measure)
    asked = stores.Asked(data_dir, teacher_path, tmp_path)
    given = asked.flags("--input_buffer_bytes=12345")
    assert main([flag for flag in given if not flag.startswith(("--runner", "--store"))]) == 0
    assert jobs[0].input_buffer_bytes == 12345


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--num_examples=5"], "--num_examples"),
        (["--teacher_rate=5"], "--dataset"),
        (["--teacher_rate=5", "--num_examples=5"], "--num_classes"),
        (["--teacher_rate=5", "--num_examples=5", "--num_classes=5", "--dataset=x"], "--dataset"),
        (["--teacher_rate=5", "--num_examples=5", "--num_classes=5", "--precompute_rate=6"], "=6"),
        (["--teacher_rate=0"], "--teacher_rate"),
        (["--teacher_rate=5", "--num_examples=5", "--num_classes=5", "--codec=topk:5"], "topk:5"),
        (["--dataset=x"], "--teacher"),
        (["--student=4"], "--students"),
    ],
)
def test_mistakes_are_refused(argv: list[str], named: str) -> None:
    with pytest.raises(UserError, match=named):
        main(argv)
