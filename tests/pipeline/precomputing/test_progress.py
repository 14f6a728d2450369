"""pipeline.precomputing.progress: the bar follows the notes of the workers."""

from __future__ import annotations

import contextlib
import re
import time
from pathlib import Path

import pytest

from pipeline.precomputing.progress import Progress, progress_name
from pipeline.store.layout import PENDING, split_directory
from pipeline.store.shards import ShardTask

TASKS = [
    ShardTask(split="test", number=0, first=0, records=7),
    ShardTask(split="views", number=0, first=0, records=20),
]


def note(store: Path, task: ShardTask, text: str) -> Path:
    path = split_directory(store, task.split) / PENDING / progress_name(task)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def shown(capsys: pytest.CaptureFixture[str]) -> list[int]:
    """Counts that the bar has shown, of 27."""
    return [int(n) for n in re.findall(r"(\d+)/27 \[", capsys.readouterr().err)]


def test_the_bar_sums_all_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(KeyboardInterrupt), Progress(tmp_path, TASKS):
        note(tmp_path, TASKS[0], "5")
        note(tmp_path, TASKS[1], "12")
        time.sleep(1.2)  # it looks twice a second
        note(tmp_path, TASKS[1], "18")
        raise KeyboardInterrupt
    counts = shown(capsys)
    assert counts == sorted(counts)
    assert counts[0] == 0
    assert 17 in counts
    assert counts[-1] == 23  # what was done when it ended


def test_splits_are_counted_separately(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before the first batch, the bar shows that workers are loading."""
    with contextlib.suppress(KeyboardInterrupt), Progress(tmp_path, TASKS):
        time.sleep(0.2)
        note(tmp_path, TASKS[0], "7")
        note(tmp_path, TASKS[1], "12")
        raise KeyboardInterrupt
    text = capsys.readouterr().err
    assert "loading" in text.split("\r")[1]
    assert "test 7/7, views 12/20" in text.split("\r")[-1]


def test_a_whole_run_ends_at_the_total(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Publishing may remove notes before the bar reads the last of them."""
    with Progress(tmp_path, TASKS):
        note(tmp_path, TASKS[1], "12").unlink()
    assert shown(capsys)[-1] == 27


@pytest.mark.parametrize(("text", "counted"), [("", 0), ("half a numb", 0), ("999999", 7)])
def test_an_incomplete_note_is_ignored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, counted: int
) -> None:
    with contextlib.suppress(ValueError), Progress(tmp_path, TASKS):
        note(tmp_path, TASKS[0], text)
        raise ValueError
    assert shown(capsys)[-1] == counted


def test_notes_of_a_run_that_died_do_not_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    note(tmp_path, TASKS[1], "20")
    with contextlib.suppress(ValueError), Progress(tmp_path, TASKS):
        raise ValueError
    assert set(shown(capsys)) == {0}


def test_only_its_own_notes_are_removed_at_the_end(tmp_path: Path) -> None:
    with Progress(tmp_path, TASKS):
        paths = [note(tmp_path, task, "1") for task in TASKS]
        kept = paths[1].with_name("views.array_record-00000.json")
        kept.write_text("{}")  # on a shard that the next run adopts
    assert not any(path.exists() for path in paths)
    assert kept.exists()
    assert not (tmp_path / "eval" / PENDING).exists()
