"""trainer.compare: comparisons of real runs, their result.json, and refusals."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import EXIT_DATA_ERROR, EXIT_USER_ERROR
from pipeline.precomputing.worker import ShardWorker
from pipeline.store.reader import StoreReader
from pipeline.store.spec import Spec
from tests import stores
from tests.runs import ROOT, checkpoint_weights, environment, fail, losses
from trainer.compare import COMPARISON_FILE, main, plan_runs
from trainer.compare import EPOCHS as EPOCHS_KEY
from trainer.comparison.finished import FinishedRun
from trainer.flags.compare import make_parser

EPOCHS = 6
BATCH = 5
STEPS = EPOCHS * stores.N // BATCH
Result = dict[str, Any]


@pytest.fixture(scope="module")
def compared_store(
    tmp_path_factory: pytest.TempPathFactory, spec: Spec, data_dir: Path, teacher_path: Path
) -> Path:
    """102 views with float32 logits, evaluation crops of both splits, and paths to find them by; read only."""
    path = tmp_path_factory.mktemp("compared") / "store"
    provenance = {"data_dir": str(data_dir), "teacher": str(teacher_path), "directory": "/"}
    changed = dataclasses.replace(spec, codec="float32", provenance=provenance)
    worker = ShardWorker(stores.job_for(path, changed, data_dir, teacher_path))
    stores.write_store(worker, epochs=EPOCHS, eval_splits=("test", "train"))
    return path


def arguments(store: Path, workdir: Path, *extra: str) -> list[str]:
    """Flags of a comparison with the `tiny` student that logs every step."""
    flags = ["--student=tiny", f"--batch_size={BATCH}", "--learning_rate=0.01", "--log_every=1"]
    return [f"--store={store}", f"--workdir={workdir}", *flags, "--deterministic", "--eval_every=5", *extra]


def start(argv: list[str]) -> subprocess.Popen[str]:
    """Starts the command in its own process."""
    command = [sys.executable, "-m", "trainer.compare", *argv]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def metrics_text(workdir: Path) -> str:
    path = workdir / "metrics.jsonl"
    return path.read_text() if path.exists() else ""


def read(workdir: Path) -> Result:
    return json.loads((workdir / "result.json").read_text())


@dataclasses.dataclass(frozen=True)
class Compared:
    """A finished comparison of `offline` and `online`."""

    argv: list[str]
    workdir: Path
    output: str

    @property
    def result(self) -> Result:
        return read(self.workdir)


def test_lengths_of_a_comparison_stay_when_the_store_has_grown(compared_store: Path, tmp_path: Path):
    flags = make_parser().parse_strictly(arguments(compared_store, tmp_path))
    store = StoreReader(compared_store)
    (tmp_path / COMPARISON_FILE).write_text(json.dumps({EPOCHS_KEY: [2, 4]}))
    planned = plan_runs(flags, store)
    assert [job.steps for job in planned] == [n * stores.N // BATCH for n in (2, 2, 4, 4)]
    assert {flag for job in planned for flag in job.argv if "epochs=" in flag and "workdir" not in flag} == {
        "--epochs=2",
        "--epochs=4",
    }
    flags.epochs = [3]
    assert [job.steps for job in plan_runs(flags, store)] == [3 * stores.N // BATCH] * 2


@pytest.fixture(scope="module")
def compared(compared_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Compared:
    workdir = tmp_path_factory.mktemp("comparison") / "work"
    argv = arguments(compared_store, workdir, "--parallel=2")
    process = start(argv)
    output, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    return Compared(argv, workdir, output)


def test_offline_and_online_are_bit_equal(compared: Compared):
    runs = [compared.workdir / "runs" / f"{arm}-seed0-epochs{EPOCHS}" for arm in ("offline", "online")]
    curves = [losses(run) for run in runs]
    assert len(curves[0]) == STEPS
    assert curves[0] == curves[1]
    (pair,) = compared.result["pairs"]
    assert (pair["a"], pair["b"], pair["seed"], pair["epochs"]) == ("offline", "online", 0, EPOCHS)
    for name in ("largest_loss_difference", "weights_distance", "weights_largest_difference"):
        assert pair[name] == 0
    assert pair["agreement"] == 1
    assert pair["top1_interval"] == [0, 0]
    assert "offline - online, seed 0, 6 epochs" in compared.output
    assert pair["mean_loss"] == pytest.approx(np.mean(list(curves[0].values())))


def test_result_has_the_figures_of_its_runs(compared: Compared):
    offline, online = compared.result["runs"]
    assert [run["arm"] for run in (offline, online)] == ["offline", "online"]
    assert (offline["teacher_passes"], online["teacher_passes"]) == (0, STEPS * BATCH)
    for run in (offline, online):
        directory = compared.workdir / run["directory"]
        result = json.loads((directory / "result.json").read_text())
        test = result["evaluation"]["test"]
        assert (run["top1"], run["agreement"]) == (test["student_top1"], test["agreement"])
        assert run["steps"] == STEPS
        assert [point["step"] for point in run["history"]] == [*range(5, STEPS + 1, 5)]
        assert run["history"][-1]["epoch"] == pytest.approx(STEPS * BATCH / stores.N)
        assert run["losses"] == [[step, loss] for step, loss in losses(directory).items()]
        assert run["history"][1]["training_loss"] == losses(directory)[10]
        assert run["history"][-1]["loss"] == run["distillation_loss"] == test["distillation_loss"]
        assert run["seconds"] == pytest.approx(run["seconds_a_step"] * STEPS)
    assert offline["learning_rates"] == online["learning_rates"]


def test_result_has_store_student_teacher_and_recipe(compared: Compared, compared_store: Path):
    result, store = compared.result, StoreReader(compared_store)
    assert result["format"] == 1
    assert result["store"]["digest"] == store.spec.digest()
    assert (result["store"]["views"], result["store"]["examples"]) == (EPOCHS * stores.N, stores.N)
    assert result["store"]["precompute_teacher_passes"] == EPOCHS * stores.N + stores.N + 7
    assert result["student"]["name"] == "tiny"
    assert result["teacher"]["parameters"] == sum(weight.size for weight in stores.teacher_weights())
    assert (result["eval_split"], result["eval_images"], result["classes"]) == ("test", 7, stores.CLASSES)
    assert result["recipe"]["batch_size"] == BATCH
    assert result["recipe"]["warmup_steps"] == STEPS // 20  # the default, resolved
    assert not {"epochs", "views"} & set(result["recipe"])
    (offline, online) = result["arms"]
    assert offline["seeds"] == online["seeds"] == [0]
    assert offline["top1_std"] is None


def test_cost_follows_from_the_measured_seconds(compared: Compared, compared_store: Path):
    cost = compared.result["cost"]
    seconds = cost["seconds_a_step"]
    assert set(seconds) == {"teacher", "student", "input", "offline", "online"}
    assert all(value > 0 for value in seconds.values())
    assert cost["saving"] == pytest.approx(seconds["online"] / seconds["offline"] - 1)
    assert cost["limit"] == pytest.approx(seconds["teacher"] / seconds["student"])
    for name, value in seconds.items():
        low, high = cost["seconds_a_step_spread"][name]
        assert low <= value <= high
    assert set(cost["seconds_a_step_in_runs"]) == {"offline", "online"}
    size = compared.result["store"]["spec"]["identity"]["teacher"]["batch_size"]
    assert (cost["teacher_batch_size"], cost["teacher_rows_a_step"]) == (size, -(-BATCH // size) * size)
    assert cost["teacher_passes"] == {"offline": 0, "online": STEPS * BATCH}
    assert cost["store_bytes"] == sum(path.stat().st_size for path in compared_store.glob("views.array*"))
    assert f"{cost['saving']:+.0%}" in compared.output


def test_same_command_again_does_nothing(compared: Compared, capsys: pytest.CaptureFixture[str]):
    def files() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in compared.workdir.rglob("*") if path.name != ".lock"}

    before = files()
    assert main(compared.argv) == 0
    assert str(compared.workdir) in capsys.readouterr().out
    assert files() == before


def test_other_flags_are_refused_with_both_sides(
    compared: Compared, float32_store: Path, capsys: pytest.CaptureFixture[str]
):
    code, message = fail([*compared.argv, "--learning_rate=0.5"], capsys, main=main)
    assert code == EXIT_USER_ERROR
    assert "learning_rate: 0.5" in message
    assert "0.01" in message
    assert read(compared.workdir) == compared.result


def test_same_figures_come_from_earlier_directories(compared: Compared, tmp_path: Path):
    run = Path(shutil.copytree(compared.workdir / "runs" / f"offline-seed0-epochs{EPOCHS}", tmp_path / "one"))
    assert main([f"--workdir={tmp_path / 'whole'}", f"--from={compared.workdir}"]) == 0
    whole, before = read(tmp_path / "whole"), compared.result
    for name in ("pairs", "arms", "cost", "store", "recipe"):
        assert whole[name] == before[name]
    online = compared.workdir / "runs" / f"online-seed0-epochs{EPOCHS}"
    assert main([f"--workdir={tmp_path / 'parts'}", f"--from={run},{online}"]) == 0
    assert read(tmp_path / "parts")["pairs"] == before["pairs"]
    cost, counted = read(tmp_path / "parts")["cost"], compared.result["cost"]
    assert cost["seconds_a_step"] is None  # single runs have no measurement, but counts
    assert all(cost[name] == counted[name] for name in ("teacher_passes", "store_bytes", "bytes_a_view"))


def test_runs_that_differ_in_more_than_arm_seed_and_length_are_not_compared(
    compared: Compared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    other = Path(
        shutil.copytree(compared.workdir / "runs" / f"online-seed0-epochs{EPOCHS}", tmp_path / "other")
    )
    config = json.loads((other / "config.json").read_text())
    config["recipe"]["weight_decay"] = 0.5
    (other / "config.json").write_text(json.dumps(config))
    offline = compared.workdir / "runs" / f"offline-seed0-epochs{EPOCHS}"
    code, message = fail([f"--workdir={tmp_path / 'out'}", f"--from={offline},{other}"], capsys, main=main)
    assert code == EXIT_USER_ERROR
    assert "weight_decay: 0.5" in message
    assert str(other) in message
    assert f"0.0003 in {offline}" in message
    again = Path(shutil.copytree(offline, tmp_path / "again"))
    code, message = fail([f"--workdir={tmp_path / 'out'}", f"--from={offline},{again}"], capsys, main=main)
    assert str(offline) in message
    assert str(again) in message


def copy_comparison(compared: Compared, directory: Path) -> tuple[Path, Path]:
    """A copy of the comparison, and its online run."""
    shutil.copytree(compared.workdir, directory)
    return directory, directory / "runs" / f"online-seed0-epochs{EPOCHS}"


def test_damaged_run_of_a_comparison_is_not_left_out_silently(
    compared: Compared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    earlier, run = copy_comparison(compared, tmp_path / "earlier")
    (run / "result.json").write_text("{")
    code, message = fail([f"--workdir={tmp_path / 'out'}", f"--from={earlier}"], capsys, main=main)
    assert code == EXIT_DATA_ERROR
    assert str(run) in message


def test_unfinished_run_of_a_comparison_is_named(
    compared: Compared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    earlier, run = copy_comparison(compared, tmp_path / "earlier")
    (run / "result.json").unlink()
    assert main([f"--workdir={tmp_path / 'out'}", f"--from={earlier}"]) == 0
    assert run.name in capsys.readouterr().out
    assert [row["arm"] for row in read(tmp_path / "out")["runs"]] == ["offline"]


def test_runs_of_unequal_steps_are_not_taken_for_a_pair(
    compared: Compared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Both round to the same number of epochs."""
    earlier, run = copy_comparison(compared, tmp_path / "earlier")
    for name in ("config.json", "result.json"):
        tree = json.loads((run / name).read_text())
        (tree["length"] if name == "config.json" else tree)["steps"] = STEPS - 1
        if name == "config.json":
            tree["flags"] |= {"steps": STEPS - 1, "epochs": None}
        (run / name).write_text(json.dumps(tree))
    shutil.rmtree(run / "checkpoints")
    code, message = fail([f"--workdir={tmp_path / 'out'}", f"--from={earlier}"], capsys, main=main)
    assert code == EXIT_USER_ERROR
    assert str(run) in message
    assert f"{STEPS - 1} steps" in message


def test_weights_are_the_trainable_ones(compared: Compared):
    run = FinishedRun.load(compared.workdir / "runs" / f"offline-seed0-epochs{EPOCHS}")
    weights = run.weights()
    kept = checkpoint_weights(run.directory)
    assert weights
    assert all(np.array_equal(array, kept[name]) for name, array in weights.items())
    statistics = [name for name in kept if "moving_" in name]
    assert not set(statistics) & set(weights)
    assert sum(array.size for array in weights.values()) == run.result["parameters"] - sum(
        kept[name].size for name in statistics if "OPTIMIZER_SLOT" not in name
    )


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--arms=offline,onlin", "'onlin'"),
        ("--epochs=0", "--epochs: 0"),
        ("--epochs=7", "--epochs=6"),
        ("--stduent=tiny", "--student?"),
        ("--seed=1", "--seeds?"),
        ("--strategy=multiworker", "--strategy=multiworker"),
        ("--teacher=nowhere", "--teacher=nowhere"),
    ],
)
def test_mistake_is_refused_before_anything_starts(
    flags: str, expected: str, compared_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    code, message = fail(
        arguments(compared_store, tmp_path / "work", "--arms=online", flags), capsys, main=main
    )
    assert code == EXIT_USER_ERROR
    assert expected in message
    assert not (tmp_path / "work").exists()


def test_store_without_evaluation_logits_is_refused(
    float32_store: Path,
    published_store: Path,
    data_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    found = f"--data_dir={data_dir}"
    argv = arguments(float32_store, tmp_path / "work", found, "--arms=offline")
    assert "--eval_splits=all" in fail(argv, capsys, main=main)[1]
    argv = arguments(published_store, tmp_path / "work", found, "--arms=offline,fixed")
    assert "--eval_splits=test,train" in fail(argv, capsys, main=main)[1]
    assert not (tmp_path / "work").exists()


def test_directory_with_other_files_is_refused(
    compared: Compared, compared_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "thesis.txt").write_text("mine")
    run = compared.workdir / "runs" / f"offline-seed0-epochs{EPOCHS}"
    for directory in (tmp_path, compared_store, run):
        code, message = fail(arguments(compared_store, directory), capsys, main=main)
        assert code == EXIT_USER_ERROR
        assert f"--workdir={directory}" in message


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_comparison_continues_to_the_same_result(compared_store: Path, tmp_path: Path):
    extra = ["--arms=consistent,independent,fixed", "--no-measure", "--checkpoint_every=1"]
    whole = start(arguments(compared_store, tmp_path / "whole", *extra, "--parallel=2"))
    _, errors = whole.communicate()
    assert whole.returncode == 0, errors[-3000:]
    argv = arguments(compared_store, tmp_path / "killed", *extra)
    runs = tmp_path / "killed" / "runs"
    finished, interrupted, waiting = (
        runs / f"{arm}-seed0-epochs{EPOCHS}" for arm in ("consistent", "independent", "fixed")
    )
    process = start(argv)
    while len(metrics_text(interrupted).splitlines()) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "killed" / "result.json").exists()
    assert not waiting.exists()
    done = (finished / "result.json").stat().st_mtime_ns
    process = start(argv)
    output, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    assert "3 runs, 1 of them finished" in output
    assert "continuing at step" in interrupted.with_name(f"{interrupted.name}.log").read_text()
    assert (finished / "result.json").stat().st_mtime_ns == done
    found, expected = read(tmp_path / "killed"), read(tmp_path / "whole")
    assert found["pairs"] == expected["pairs"]
    pairs = [(pair["a"], pair["b"]) for pair in found["pairs"]]
    assert pairs == [("consistent", "fixed"), ("consistent", "independent")]
    assert all(pair["weights_distance_relative"] > 1e-3 for pair in found["pairs"])
    assert [run["losses"] for run in found["runs"]] == [run["losses"] for run in expected["runs"]]
