"""trainer.train: interrupted runs continue and end bit-equal; finished runs are extended."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import EXIT_USER_ERROR
from pipeline.precomputing.worker import ShardWorker
from pipeline.store.spec import Spec
from tests import stores
from tests.runs import (
    arguments,
    assert_same_weights,
    checkpoint_weights,
    fail,
    losses,
    metrics,
    start_run,
)
from trainer.run.checkpoints import Checkpoints
from trainer.run.training import Run
from trainer.train import main


class Snapshots:
    """Copies the work directory after each checkpoint, as a kill at that step leaves it."""

    def __init__(self, checkpoints: Checkpoints, workdir: Path, to: Path) -> None:
        self._checkpoints, self._workdir, self._to = checkpoints, workdir, to

    def __getattr__(self, name: str) -> Any:
        return getattr(self._checkpoints, name)

    def save(self, step: int) -> None:
        self._checkpoints.save(step)
        shutil.copytree(self._workdir, self._to / str(step), dirs_exist_ok=True)


def check_resume_at_every_step(argv: list[str], root: Path) -> Run:
    """Trains without interruption, then once from each step; all runs must end bit-equal."""
    argv = [*argv, "--log_every=1", "--checkpoint_every=1"]
    whole = start_run([*argv, f"--workdir={root / 'whole'}"])
    whole.checkpoints = Snapshots(whole.checkpoints, whole.workdir, root / "at")  # type: ignore[assignment]
    whole.train()
    expected = checkpoint_weights(whole.workdir)
    steps = whole.options.length.steps
    assert sorted(path.name for path in (root / "at").iterdir()) == [str(n) for n in range(1, steps + 1)]
    for step in range(1, steps):
        resumed = start_run([*argv, f"--workdir={root / 'at' / str(step)}"])
        assert resumed.train()["first_step"] == step
        found = checkpoint_weights(resumed.workdir)
        assert found.keys() == expected.keys()
        assert_same_weights([found[name] for name in expected], list(expected.values()))
        assert losses(resumed.workdir) == losses(whole.workdir)
    return whole


def without_workdir(argv: list[str]) -> list[str]:
    return [flag for flag in argv if not flag.startswith("--workdir")]


@pytest.mark.slow
@pytest.mark.usefixtures("deterministic")
def test_run_resumed_at_every_step_ends_bit_equal(three_epochs: Path, data_dir: Path, tmp_path: Path):
    argv = without_workdir(arguments(three_epochs, tmp_path, data_dir, "--batch_size=12", "--eval_every=3"))
    whole = check_resume_at_every_step(argv, tmp_path)
    assert whole.options.length.steps == 4  # of 17 views an epoch: 1 and 2 cross its end


@pytest.mark.slow
@pytest.mark.usefixtures("deterministic")
def test_run_resumed_at_every_step_across_the_end_of_the_store_ends_bit_equal(
    one_epoch: Path, data_dir: Path, teacher_path: Path, tmp_path: Path
):
    argv = without_workdir(
        arguments(one_epoch, tmp_path, data_dir, "--batch_size=8", "--steps=4", f"--teacher={teacher_path}")
    )
    whole = check_resume_at_every_step(argv, tmp_path)
    assert whole.options.length.online_from == 2  # 16..23 straddles the end


def test_run_is_extended_past_the_store_with_the_online_teacher(
    one_epoch: Path,
    spec: Spec,
    data_dir: Path,
    teacher_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    store = Path(shutil.copytree(one_epoch, tmp_path / "store"))
    argv = arguments(store, tmp_path / "run", data_dir, "--log_every=1", "--epochs=2")
    code, message = fail(argv, capsys)
    assert code == EXIT_USER_ERROR
    assert "30 views" in message
    assert "17 (1 epoch)" in message
    assert "--teacher" in message
    assert not (tmp_path / "run").exists()  # before anything is created
    run = start_run([*argv[:-1], "--epochs=1"])
    assert run.train()["steps"] == 3
    assert main([*argv, f"--teacher={teacher_path}"]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["first_step"], result["steps"], result["teacher_forward_passes"]) == (3, 6, 15)
    assert list(losses(tmp_path / "run")) == [1, 2, 3, 4, 5, 6]
    assert result["evaluation"] == {}  # the store has no evaluation logits
    assert result["best"] is None
    assert not (tmp_path / "run" / "student_best").exists()

    # With evaluation logits, the finished run is evaluated; the entries about the training stay.
    worker = ShardWorker(stores.job_for(store, spec, data_dir, teacher_path))
    stores.write_store(worker, epochs=1, eval_splits=("test",))
    assert main([*argv, f"--teacher={teacher_path}"]) == 0
    again = json.loads((tmp_path / "run" / "result.json").read_text())
    assert list(again["evaluation"]) == ["test"]
    assert again["best"] == {"step": 6, "split": "test", **again["evaluation"]["test"]}
    assert {name: again[name] for name in ("first_step", "seconds", "teacher_forward_passes")} == {
        name: result[name] for name in ("first_step", "seconds", "teacher_forward_passes")
    }
    assert losses(tmp_path / "run").keys() == {1, 2, 3, 4, 5, 6}
    assert [line["step"] for line in metrics(tmp_path / "run", "eval_test")] == [6]
