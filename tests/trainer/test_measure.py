"""trainer.measure: contenders take turns; what real steps cost is in test_compare."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import EXIT_USER_ERROR
from tests.runs import arguments, fail
from trainer.measure import main, measure


def test_contenders_take_turns_and_the_first_round_does_not_count() -> None:
    done: list[str] = []
    seconds, steps = measure({name: lambda name=name: done.append(name) for name in "ab"})
    assert set(seconds) == {"a", "b"}
    assert all(value > 0 for value in seconds.values())
    first = done.index("b")
    warm_up, turns = done[: 2 * first], done[2 * first :]
    assert first > 2  # traced, and then as many steps as the input takes to fill its buffers
    assert warm_up == ["a"] * first + ["b"] * first
    rounds, rest = divmod(len(turns), 2 * steps)
    assert rest == 0
    assert rounds >= 2
    assert turns == ["a"] * steps + ["b"] * steps + turns[: (rounds - 1) * 2 * steps]


def test_one_device_is_measured(
    published_store: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = arguments(published_store, tmp_path, data_dir, "--strategy=mirrored")
    argv = [flag for flag in argv if not flag.startswith("--workdir")]
    code, line = fail([*argv, f"--output={tmp_path / 'cost.json'}"], capsys, main=main)
    assert code == EXIT_USER_ERROR
    assert "--strategy=mirrored: one device is measured" in line
    assert not (tmp_path / "cost.json").exists()
