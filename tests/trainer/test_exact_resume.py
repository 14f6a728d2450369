"""trainer.train: a run that is killed at any point and continued equals an undisturbed run, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tensorflow as tf

from tests.campaigns.exact_resume import (
    FLAGS,
    differences,
    half_written,
    kill_and_continue,
    make_runs,
    random_steps,
    run_campaign,
)
from tests.runs import arguments
from trainer.run import training
from trainer.run.callbacks import MetricsLog
from trainer.run.checkpoints import Checkpoints
from trainer.run.evaluation import Evaluator
from trainer.train import main

KILLS = 20
STEPS = 400


@pytest.fixture
def across(published_store: Path, data_dir: Path, teacher_path: Path, tmp_path: Path) -> list[str]:
    """Flags of a run that is replayed for 10 steps, and online then."""
    flags = arguments(published_store, tmp_path, data_dir, *FLAGS, f"--teacher={teacher_path}")
    return [flag for flag in flags if not flag.startswith("--workdir")]


@pytest.mark.slow
@pytest.mark.usefixtures("deterministic")
def test_process_killed_on_both_sides_of_the_end_of_the_store_ends_bit_equal(
    across: list[str], tmp_path: Path
):
    argv = [*across, "--steps=70"]
    kills = kill_and_continue(argv, tmp_path / "killed", steps=[5, 25])
    for kill in kills:
        assert kill.saved <= kill.died
        assert kill.run["batch_size"] == 5
        assert {"spec", "recipe_name", "student"} <= kill.run.keys()
    for name in ("killed", "undisturbed"):
        assert main([*argv, f"--workdir={tmp_path / name}"]) == 0
    assert differences(tmp_path / "killed", tmp_path / "undisturbed") == []


class KilledError(BaseException):
    """Stands for a kill."""


def die(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, when: Callable[..., bool], *, after: bool
) -> None:
    """Fails once, before or after the first call for which `when` is true."""
    original, dead = getattr(owner, name), []

    def call(*args: Any, **kwargs: Any) -> Any:
        now = not dead and when(*args)
        if now and not after:
            dead.append(now)
            raise KilledError
        out = original(*args, **kwargs)
        if now:
            dead.append(now)
            raise KilledError
        return out

    monkeypatch.setattr(owner, name, call)


def number_of(manager: tf.train.CheckpointManager) -> int:
    return int(manager.latest_checkpoint.rsplit("-", 1)[1])


MANAGER = tf.train.CheckpointManager


@pytest.mark.slow
@pytest.mark.usefixtures("deterministic")
def test_run_killed_between_any_two_writes_ends_bit_equal(
    across: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    argv = [*across, "--steps=11", "--checkpoint_every=2", "--eval_every=4"]
    assert main([*argv, f"--workdir={tmp_path / 'undisturbed'}"]) == 0
    killed = [*argv, f"--workdir={tmp_path / 'killed'}"]
    for owner, name, when, after in (
        # The first checkpoint exists, but not its note.
        (MANAGER, "_record_state", lambda manager: number_of(manager) == 2, False),
        (MetricsLog, "write", lambda log, step, figures: step == 3, True),
        # Saved, not evaluated.
        (Evaluator, "evaluate", lambda evaluator, student: True, False),
        # Evaluated, not saved as the best.
        (Checkpoints, "save_best", lambda checkpoints, step, evaluation: step == 4, False),
        # Saved as the best, without a line.
        (Checkpoints, "save_best", lambda checkpoints, step, evaluation: step == 4, True),
        # Noted, the oldest not removed.
        (MANAGER, "_sweep", lambda manager: number_of(manager) == 8, False),
        (training, "export_student", lambda student, path: True, True),
        (training, "write_json", lambda path, tree: path.name == "result.json", False),
    ):
        with monkeypatch.context() as patch:
            die(patch, owner, name, when, after=after)
            with pytest.raises(KilledError):
                main(killed)
    assert main(killed) == 0
    assert differences(tmp_path / "killed", tmp_path / "undisturbed") == []
    assert half_written(tmp_path / "killed") == []


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return make_runs(tmp_path_factory.mktemp("runs"), steps=STEPS)


@pytest.mark.slow  # ten minutes on 2 cores: 66 processes that import TensorFlow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["offline", "online", "switch"])
def test_run_killed_at_twenty_random_steps_ends_bit_equal(
    runs: dict[str, list[str]], tmp_path: Path, name: str
):
    kills = random_steps(KILLS, steps=STEPS, seed=0)
    assert len(run_campaign(name, runs[name], tmp_path, kills=kills, seed=0)) == KILLS
