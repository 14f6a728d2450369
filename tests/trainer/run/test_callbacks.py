"""trainer.run.callbacks: when lines, evaluations and checkpoints are written, also by a resumed run."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from pipeline.errors import UserError
from pipeline.precomputing.worker import ShardWorker
from pipeline.store.spec import Spec
from tests import stores
from tests.runs import arguments, assert_same_weights, losses, metrics, scalars, start_run
from trainer.run.callbacks import MetricsLog
from trainer.run.checkpoints import saved_path
from trainer.run.training import Run
from trainer.train import main

STEPS = 10  # of 5 views; the store has 51 views


class KilledError(Exception):
    """Stands for a kill."""


def lines(workdir: Path) -> list[tuple[int, str]]:
    return [(line["step"], line["kind"]) for line in metrics(workdir)]


@pytest.fixture
def run_of(published_store: Path, data_dir: Path, tmp_path: Path) -> Any:
    """Builds a run in a directory of this test."""

    def start(name: str, *extra: str) -> Run:
        return start_run(arguments(published_store, tmp_path / name, data_dir, *extra))

    return start


def kill_in_evaluation(run: Run, number: int) -> Run:
    """Makes the run fail in its evaluation `number`, counted from 1."""
    evaluator_of = run.evaluator

    def evaluator(split: str) -> Any:
        out, count = evaluator_of(split), iter(range(1, 1000))
        evaluate = out.evaluate

        def evaluate_or_die(student: tf.keras.Model) -> Any:
            if next(count) == number:
                raise KilledError
            return evaluate(student)

        out.evaluate = evaluate_or_die
        return out

    run.evaluator = evaluator
    return run


def test_lines_evaluations_checkpoints_and_tensorboard_are_written_when_due(run_of: Any):
    run = run_of("run", "--log_every=4", "--eval_every=3", "--checkpoint_every=4")
    run.train()
    assert lines(run.workdir) == [
        (3, "eval_test"),
        (4, "train"),
        (6, "eval_test"),
        (8, "train"),
        (9, "eval_test"),
        (10, "train"),
        (10, "eval_test"),
    ]
    found = sorted(path.stem for path in (run.workdir / "checkpoints").glob("*.index"))
    assert found == ["ckpt-10", "ckpt-8", "ckpt-9"]
    for line in metrics(run.workdir, "train"):
        assert line["epoch"] == line["step"] * 5 / 17
        assert line["learning_rate"] == pytest.approx(float(run.learning_rate(line["step"] - 1)))
        assert line["loss"] > 0
    shown = scalars(run.workdir)
    assert shown["train/loss"] == pytest.approx(losses(run.workdir), rel=1e-6)
    tops = {line["step"]: line["student_top1"] for line in metrics(run.workdir, "eval_test")}
    assert shown["eval_test/student_top1"] == pytest.approx(tops, rel=1e-6)


def best_step(workdir: Path) -> int:
    (index,) = (workdir / "checkpoints" / "best").glob("*.index")
    return int(index.stem.removeprefix("ckpt-"))


def test_resumed_run_repeats_the_interrupted_evaluation_and_keeps_the_best(run_of: Any):
    flags = ("--log_every=2", "--eval_every=4", "--checkpoint_every=2")
    run = run_of("run", *flags)
    with pytest.raises(KilledError):
        kill_in_evaluation(run, 2).train()
    assert best_step(run.workdir) == 4
    assert saved_path(run.workdir / "checkpoints") == str(run.workdir / "checkpoints" / "ckpt-8")
    # A score that no evaluation exceeds.
    run.checkpoints.save_best(4, {"split": "test", "student_top1": 2.0})
    run_of("run", *flags).train()
    assert lines(run.workdir) == [
        *((2, "train"), (4, "train"), (4, "eval_test"), (6, "train"), (8, "train"), (8, "eval_test")),
        *((10, "train"), (10, "eval_test")),
    ]
    assert best_step(run.workdir) == 4


@pytest.fixture
def log_of(tmp_path: Path) -> Iterator[Any]:
    """Opens the log of a directory for a run that continues from a step."""
    opened: list[MetricsLog] = []

    def open_at(step: int) -> MetricsLog:
        opened.append(MetricsLog(tmp_path, step=step))
        return opened[-1]

    yield open_at
    for log in opened:
        log.close()


def test_lines_past_the_checkpoint_are_replaced(log_of: Any, tmp_path: Path):
    first = log_of(0)
    for step in (1, 2, 3, 4):
        first.write(step, {"loss": 1.0 / step}, prefix="train")
    second = log_of(2)
    second.write(3, {"loss": 9.0}, prefix="train")
    assert [(line["step"], line["loss"]) for line in metrics(tmp_path)] == [(1, 1.0), (2, 0.5), (3, 9.0)]


def test_half_written_line_is_dropped(log_of: Any, tmp_path: Path):
    log_of(0).write(1, {"loss": 1.0}, prefix="train")
    path = tmp_path / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + whole[:-9])
    log_of(1).write(2, {"loss": 2.0}, prefix="train")
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2]


@pytest.mark.parametrize("damage", ['"student_top1"', '"agreement": 0.5', '"examples": 7'])
def test_damaged_evaluation_of_the_current_step_is_dropped(log_of: Any, tmp_path: Path, damage: str):
    figures = {
        "examples": 7,
        "student_top1": 0.5,
        "teacher_top1": 0.5,
        "agreement": 0.5,
        "distillation_loss": 1.0,
    }
    log = log_of(0)
    log.write(1, {"loss": 1.0, "learning_rate": 0.1}, prefix="train")
    log.write(1, figures, prefix="eval_test")
    path = tmp_path / "metrics.jsonl"
    assert [line["kind"] for line in log_of(1).kept] == ["eval_test"]
    path.write_text(path.read_text().replace(damage, '"x": 1'[: -3 if ":" not in damage else None]))
    assert log_of(1).kept == []
    assert [line["kind"] for line in metrics(tmp_path)] == ["train"]


def test_run_from_the_start_begins_an_empty_log(log_of: Any, tmp_path: Path):
    log_of(0).write(1, {"loss": 1.0}, prefix="train")
    log_of(0)
    assert metrics(tmp_path) == []


def test_tensorboard_shows_each_step_once_after_a_kill(log_of: Any, tmp_path: Path):
    first = log_of(0)
    for step in (1, 2, 3, 4):
        first.write(step, {"loss": 1.0 / step}, prefix="train")
    first.flush()
    time.sleep(1.1)  # TensorBoard orders files by the second in their names; processes are further apart
    second = log_of(2)
    second.write(3, {"loss": 9.0}, prefix="train")
    second.flush()
    assert scalars(tmp_path) == {"train/loss": {1: 1.0, 2: 0.5, 3: 9.0}}


def test_best_of_another_split_or_of_a_later_step_does_not_count(run_of: Any):
    flags = ("--eval_every=4", "--steps=4")
    for name, step, split in (("split", 2, "validation"), ("step", 8, "test")):
        run = run_of(name, *flags)
        run.checkpoints.save_best(step, {"split": split, "student_top1": 2.0})
        run.train()
        assert best_step(run.workdir) == 4


@pytest.mark.slow
def test_best_checkpoint_survives_an_evaluation_on_another_split(
    published_store: Path, data_dir: Path, spec: Spec, teacher_path: Path, tmp_path: Path
):
    """The finished run is evaluated on `train`, and on `test` again, without training."""
    store = Path(shutil.copytree(published_store, tmp_path / "store"))
    worker = ShardWorker(stores.job_for(store, spec, data_dir, teacher_path))
    stores.write_store(worker, epochs=3, eval_splits=("test", "train"))
    argv = arguments(store, tmp_path / "run", data_dir, "--eval_every=1", "--steps=4", "--learning_rate=0.1")
    exported = []
    for split in ("test", "train", "test"):
        assert main([*argv, f"--eval_split={split}"]) == 0
        best = json.loads((tmp_path / "run" / "result.json").read_text())["best"]
        variables = tf.saved_model.load(str(tmp_path / "run" / "student_best")).variables
        exported.append((best, best_step(tmp_path / "run"), [value.numpy() for value in variables]))
    assert exported[0][0]["split"] == "test"
    for again in exported[1:]:
        assert again[:2] == exported[0][:2]
        assert_same_weights(again[2], exported[0][2])


def test_weights_that_are_not_finite_are_not_saved(run_of: Any):
    run = run_of("run", "--log_every=100", "--checkpoint_every=2", "--eval_every=100")
    save = run.checkpoints.save

    def save_and_spoil(step: int) -> None:
        save(step)
        bias = run.student.trainable_variables[-1]
        bias.assign(np.full(bias.shape, np.nan))

    run.checkpoints.save = save_and_spoil
    with pytest.raises(UserError) as error:
        run.train()
    assert "step 4" in str(error.value)
    assert "--learning_rate" in str(error.value)
    assert saved_path(run.workdir / "checkpoints") == str(run.workdir / "checkpoints" / "ckpt-2")


def test_evaluation_is_in_tensorboard_before_its_line_is_written(tmp_path: Path) -> None:
    """A run that is killed right after the line does not repeat the evaluation. Here it fails right before."""
    log = MetricsLog(tmp_path, step=0)
    (tmp_path / "metrics.jsonl").mkdir()  # makes writing the line fail
    with pytest.raises(IsADirectoryError):
        log.write(1, {"student_top1": 0.25}, prefix="eval_test")
    assert scalars(tmp_path)["eval_test/student_top1"] == {1: 0.25}
    log.close()
