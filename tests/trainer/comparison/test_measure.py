"""trainer.comparison.measure: contenders take turns. test_compare measures real steps."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from pipeline.errors import EXIT_USER_ERROR
from tests.runs import arguments, fail
from trainer.comparison.measure import NAMES, TURNS, main, measure


def test_contenders_take_turns_and_the_first_round_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.comparison.measure._ROUNDS", 2)
    done: list[str] = []
    turns: list[int] = []
    measured = measure(
        {name: lambda name=name: done.append(name) for name in "ab"}, on_turn=lambda: turns.append(len(done))
    )
    steps = measured.steps["a"]
    warm_up = done.index("b")
    assert warm_up > 2  # tracing, then the steps that determine the steps per turn
    rounds = len("ab") * (2 + 1)
    expected = [warm_up, 2 * warm_up] + [2 * warm_up + steps * turn for turn in range(1, rounds + 1)]
    assert turns == expected
    assert done[2 * warm_up :] == (["a"] * steps + ["b"] * steps) * (2 + 1)
    for name in "ab":
        low, high = measured.spread[name]
        assert 0 < low <= measured.seconds[name] <= high


def test_turn_includes_the_cost_of_its_own_batches_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches are prefetched during the turns of others; their cost belongs to the turn that takes them."""
    monkeypatch.setattr("trainer.comparison.measure._ROUNDS", 3)
    cost = 0.005

    def work(number: np.int64) -> np.int64:
        until = time.thread_time() + cost
        while time.thread_time() < until:
            pass
        return number

    batches = tf.data.Dataset.range(10_000).map(lambda n: tf.numpy_function(work, [n], tf.int64)).prefetch(16)
    drawn = iter(batches)
    measured = measure({"input": lambda: next(drawn), "other": lambda: time.sleep(0.001)})
    assert measured.seconds["input"] > 0.9 * cost
    assert measured.seconds["other"] < cost


def test_turns_of_a_whole_measurement_are_counted() -> None:
    turns: list[None] = []
    measure(dict.fromkeys(NAMES, lambda: None), on_turn=lambda: turns.append(None))
    assert len(turns) == TURNS


def test_one_device_is_measured(
    published_store: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = arguments(published_store, tmp_path, data_dir, "--strategy=mirrored")
    argv = [flag for flag in argv if not flag.startswith("--workdir")]
    code, line = fail([*argv, f"--output={tmp_path / 'cost.json'}"], capsys, main=main)
    assert code == EXIT_USER_ERROR
    assert "--strategy=mirrored" in line
    assert not (tmp_path / "cost.json").exists()
