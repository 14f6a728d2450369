"""trainer.comparison.finished: runs read from their directories."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import DataError, UserError
from tests.runs import arguments, checkpoint_weights, losses, metrics
from trainer.comparison.finished import FinishedRun, is_finished
from trainer.train import main

STEPS = 7


@pytest.fixture(scope="module")
def finished(published_store: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 7 steps with two evaluations; read only."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    extra = (f"--steps={STEPS}", "--log_every=2", "--eval_every=4", "--seed=3")
    assert main(arguments(published_store, workdir, data_dir, *extra)) == 0
    return workdir


def test_figures_are_those_of_the_run(finished: Path) -> None:
    run = FinishedRun.load(finished)
    assert (run.arm, run.seed, run.steps, run.batch_size, run.teacher_passes) == ("offline", 3, STEPS, 5, 0)
    curve = run.curve("loss")
    assert dict(zip(curve.steps.tolist(), curve.values.tolist(), strict=True)) == losses(finished)
    assert run.evaluation["student_top1"] == metrics(finished, "eval_test")[-1]["student_top1"]
    top1, labels = run.predictions()
    assert len(top1) == run.evaluation["examples"]
    assert run.evaluation["student_top1"] == pytest.approx((top1 == labels).mean())


def test_weights_are_those_of_the_student(finished: Path) -> None:
    weights, saved = FinishedRun.load(finished).weights(), checkpoint_weights(finished)
    assert weights
    assert all(name.startswith("student/") for name in weights)
    for name, array in weights.items():
        np.testing.assert_array_equal(array, saved[name])


def test_history_has_the_last_logged_training_loss(finished: Path) -> None:
    row = FinishedRun.load(finished).to_json(relative_to=finished.parent)
    assert row["directory"] == "run"
    assert [point["step"] for point in row["history"]] == [4, STEPS]
    assert [point["training_loss"] for point in row["history"]] == [losses(finished)[s] for s in (4, STEPS)]
    assert row["losses"] == [[step, loss] for step, loss in losses(finished).items()]


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


@pytest.mark.parametrize("name", ["result.json", "student", "predictions.npz"])
def test_incomplete_run_is_not_finished(copy: Path, name: str) -> None:
    path = copy / name
    assert is_finished(copy, steps=STEPS)
    assert not is_finished(copy, steps=STEPS + 1)
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert not is_finished(copy)
    with pytest.raises(UserError, match=re.escape(str(copy))):
        FinishedRun.load(copy)


@pytest.mark.parametrize("steps", [STEPS + 7, STEPS - 1])
def test_run_that_is_being_extended_is_not_finished(copy: Path, steps: int) -> None:
    """config.json has the new length; result.json and the checkpoint are those of the finished run."""
    rewrite(copy / "config.json", length__steps=steps)
    assert not is_finished(copy)
    with pytest.raises(UserError, match=re.escape(str(copy))):
        FinishedRun.load(copy)


def test_run_with_a_newer_checkpoint_is_not_finished(copy: Path) -> None:
    for name in ("result.json", "config.json"):
        tree = json.loads((copy / name).read_text())
        (tree["length"] if name == "config.json" else tree)["steps"] = STEPS - 1
        (copy / name).write_text(json.dumps(tree))
    assert not is_finished(copy)


@pytest.mark.parametrize("name", ["result.json", "config.json"])
def test_damaged_run_is_not_taken_for_an_unfinished_one(copy: Path, name: str) -> None:
    (copy / name).write_text("{")
    with pytest.raises(DataError, match=re.escape(str(copy))):
        is_finished(copy)


def test_epochs_are_those_asked_for_if_they_give_the_steps(copy: Path) -> None:
    """A run that kept its length is not labeled with the epochs of its recipe or of a later command."""
    rewrite(copy / "config.json", flags__steps=None, flags__epochs=None, recipe__epochs=10_000)
    assert FinishedRun.load(copy).epochs == round(STEPS * 5 / 17)
    rewrite(copy / "config.json", flags__epochs=3)
    assert FinishedRun.load(copy).epochs == round(STEPS * 5 / 17)
    rewrite(copy / "config.json", length__steps=10, flags__epochs=3)
    rewrite(copy / "result.json", steps=10, epochs=50 / 17)
    shutil.rmtree(copy / "checkpoints")
    assert FinishedRun.load(copy).epochs == 3


def test_damaged_metrics_are_reported(copy: Path) -> None:
    (copy / "metrics.jsonl").write_text("{")
    with pytest.raises(DataError, match=re.escape(str(copy))):
        FinishedRun.load(copy)


def test_missing_checkpoints_are_reported(copy: Path) -> None:
    shutil.rmtree(copy / "checkpoints")
    run = FinishedRun.load(copy)
    with pytest.raises(UserError, match=re.escape(str(copy))):
        run.weights()
    assert json.loads((copy / "result.json").read_text())["steps"] == STEPS


def rewrite(path: Path, **changes: object) -> None:
    tree = json.loads(path.read_text())
    for name, value in changes.items():
        *parents, last = name.split("__")
        branch = tree
        for parent in parents:
            branch = branch[parent]
        branch[last] = value
    path.write_text(json.dumps(tree))


def test_epochs_of_a_run_given_in_steps_are_the_trained_ones(copy: Path) -> None:
    """The recipe's epochs were not trained."""
    rewrite(copy / "config.json", recipe__epochs=10_000)
    assert FinishedRun.load(copy).epochs == round(STEPS * 5 / 17)
    rewrite(copy / "result.json", epochs=0.25)
    assert FinishedRun.load(copy).epochs == 0.25


def test_figures_are_those_of_the_last_evaluated_split(copy: Path) -> None:
    evaluation = json.loads((copy / "result.json").read_text())["evaluation"]["test"]
    later = evaluation | {"student_top1": 0.125}
    rewrite(
        copy / "result.json", evaluation={"test": evaluation, "validation": later}, eval_split="validation"
    )
    run = FinishedRun.load(copy)
    assert run.evaluation["student_top1"] == 0.125
    assert run.to_json(relative_to=copy)["history"] == []


@pytest.mark.parametrize("name", ["flags", "recipe", "length", "warmup_steps"])
def test_config_without_an_entry_is_damaged(name: str, copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    del config[name]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=name):
        FinishedRun.load(copy)


@pytest.mark.parametrize("content", [b"", b"no predictions", b"PK\x03\x04"])
def test_damaged_predictions_are_reported(content: bytes, copy: Path) -> None:
    run = FinishedRun.load(copy)
    (copy / "predictions.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"predictions\.npz"):
        run.predictions()
