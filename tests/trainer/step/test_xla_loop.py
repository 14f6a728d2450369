"""`--steps_per_execution`: several steps per call equal single steps, and logs and checkpoints stay on schedule."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import EXIT_DATA_ERROR, Interrupted
from tests.runs import (
    arguments,
    assert_same_weights,
    checkpoint_weights,
    fail,
    forge_records,
    losses,
    metrics,
    start_run,
)
from trainer.run.preemption import Preemption
from trainer.run.training import Run

STEPS = 10  # of 5 views; the store holds 51

pytestmark = pytest.mark.usefixtures("deterministic")


@pytest.fixture
def run_of(published_store: Path, data_dir: Path, tmp_path: Path) -> Any:
    """Starts a run in a directory of the test."""

    def start(name: str, *extra: str) -> Run:
        return start_run(arguments(published_store, tmp_path / name, data_dir, *extra))

    return start


@pytest.fixture(scope="module")
def one_by_one(published_store: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that logs every step."""
    workdir = tmp_path_factory.mktemp("one_by_one") / "run"
    run = start_run(arguments(published_store, workdir, data_dir, "--log_every=1", "--eval_every=5"))
    run.train()
    return run


def assert_same_state(run: Run, other: Run) -> None:
    """Compares weights, optimizer state and step, bit for bit."""
    found, expected = checkpoint_weights(run.workdir), checkpoint_weights(other.workdir)
    assert found.keys() == expected.keys()
    assert_same_weights([found[name] for name in expected], list(expected.values()))


def traces(run: Run) -> int:
    return run.distiller.train_tf_function.experimental_get_tracing_count()


@pytest.mark.parametrize("steps", [4, 20])
def test_several_steps_at_once_are_the_same_steps(steps: int, one_by_one: Run, run_of: Any):
    """The last call in each interval of 5 steps is shorter, but does not cause another trace."""
    run = run_of("run", f"--steps_per_execution={steps}", "--log_every=1", "--eval_every=5")
    result = run.train()
    assert result["steps"] == STEPS
    assert result["seconds_a_step"]["replay"] > 0
    assert_same_state(run, one_by_one)
    # Each call reports its last step.
    ends = [first + min(end, 5) for first in (0, 5) for end in range(steps, 5 + steps, steps)]
    every = losses(one_by_one.workdir)
    assert losses(run.workdir) == {end: every[end] for end in ends}
    assert metrics(run.workdir, "eval_test") == metrics(one_by_one.workdir, "eval_test")
    assert traces(run) == 1


def test_logs_and_checkpoints_due_inside_a_call_follow_at_its_end(run_of: Any):
    run = run_of("run", "--steps_per_execution=4", "--log_every=3", "--checkpoint_every=5", "--eval_every=10")
    run.train()
    # Calls end at 4, 8 and 10; logs are due at 3, 6 and 9, checkpoints at 5 and 10.
    assert [(line["step"], line["kind"]) for line in metrics(run.workdir)] == [
        *((4, "train"), (8, "train"), (10, "train"), (10, "eval_test"))
    ]
    assert sorted(path.stem for path in (run.workdir / "checkpoints").glob("*.index")) == [
        "ckpt-10",
        "ckpt-8",
    ]


def test_no_call_straddles_the_end_of_the_store(
    one_epoch: Path, data_dir: Path, teacher_path: Path, tmp_path: Path
):
    """Steps 0 to 2 are stored, 3 to 9 online."""
    runs = []
    for steps in (1, 2):
        flags = (f"--steps_per_execution={steps}", f"--teacher={teacher_path}", "--steps=10", "--log_every=1")
        run = start_run(arguments(one_epoch, tmp_path / str(steps), data_dir, "--eval_every=10", *flags))
        assert run.train()["teacher_forward_passes"] == 35
        assert run.options.length.online_from == 3
        runs.append(run)
    assert_same_state(runs[1], runs[0])
    assert list(losses(runs[1].workdir)) == [2, 3, 5, 7, 9, 10]
    assert traces(runs[1]) == traces(runs[0]) == 2  # from step 3, batches have another structure


class SigtermAt(Preemption):
    """SIGTERM arrives during step `step`."""

    def __init__(self, step: int, reached: Callable[[], int]) -> None:
        super().__init__()
        self._step, self._reached = step, reached

    def defer(self) -> None:
        super().defer()
        if self._reached() >= self._step:
            self.requested = signal.SIGTERM


def test_run_preempted_and_continued_with_other_calls_ends_the_same(one_by_one: Run, run_of: Any):
    run = run_of("run", "--steps_per_execution=4", "--log_every=1", "--eval_every=5")
    run.preemption = SigtermAt(6, lambda: int(run.optimizer.iterations))
    with pytest.raises(Interrupted, match=r"SIGTERM.*step 9"):  # calls end at 4, 5, 9
        run.train()
    assert run.checkpoints.restore() == 9
    again = run_of("run", "--steps_per_execution=3", "--log_every=1", "--eval_every=5")
    assert again.train()["first_step"] == 9
    assert_same_state(again, one_by_one)
    assert list(losses(again.workdir)) == [4, 5, 9, 10]
    config = json.loads((again.workdir / "config.json").read_text())
    assert config["flags"]["steps_per_execution"] == 3


def test_damaged_view_inside_a_call_is_named(
    store: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    forge_records(store, 43, crop_hash=0xDEADBEEF)
    argv = arguments(store, tmp_path / "run", data_dir, "--steps_per_execution=4", "--log_every=1")
    code, message = fail([*argv, "--eval_every=100"], capsys)
    assert code == EXIT_DATA_ERROR
    assert "view 43 " in message
    assert "crop fingerprint is" in message
    assert list(losses(tmp_path / "run")) == [4, 8]
    assert not (tmp_path / "run" / "result.json").exists()
