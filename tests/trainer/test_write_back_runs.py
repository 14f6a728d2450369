"""trainer.train --write_back: appended shards equal those of the precompute, byte for byte, after any kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import verify
from pipeline.errors import EXIT_DATA_ERROR, EXIT_TERMINATED, EXIT_USER_ERROR
from pipeline.precomputing.worker import ShardWorker
from pipeline.storage.lock import writer_lock
from pipeline.store.reader import StoreReader
from tests import stores
from tests.runs import (
    ROOT,
    arguments,
    command,
    environment,
    fail,
    forge_smallest_logit,
    losses,
    metrics,
    run_process,
    start_run,
)
from tests.stores import assert_same_store, assert_whole, published_files
from tests.trainer.test_endless import run_until
from trainer.train import main

N = stores.N
Precompute = Callable[..., Path]


@pytest.fixture
def argv(grown: Path, data_dir: Path, teacher_path: Path, tmp_path: Path) -> list[str]:
    """Flags of a run with --write_back, without its length; 5 views per step, teacher batches of 4."""
    flags = ("--write_back", "--log_every=1", "--deterministic", f"--teacher={teacher_path}")
    return arguments(grown, tmp_path / "run", data_dir, *flags)


@pytest.mark.usefixtures("deterministic")
def test_shards_are_the_precompute_s_and_the_next_student_needs_no_teacher(
    argv: list[str],
    grown: Path,
    data_dir: Path,
    teacher_path: Path,
    precompute: Precompute,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    # Two epochs of 17 views per shard, and a last epoch.
    assert main([*argv, "--epochs=6", "--views_per_shard=40"]) == 0
    assert f"5 epochs appended to {grown}, which has 6" in capsys.readouterr().out
    assert_same_store(grown, precompute(6, views_per_shard=2 * N))
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["epochs_written_back"] == 5
    # 102 views are 20 steps of 5; the last two views, which no step trains on, complete the epoch.
    assert result["steps"] == 20
    flags = [f"--store={grown}", f"--data_dir={data_dir}", f"--teacher={teacher_path}", "--fraction=1"]
    assert verify.main(flags) == 0

    assert main(arguments(grown, tmp_path / "next", data_dir, "--log_every=1", "--deterministic")) == 0
    capsys.readouterr()
    assert losses(tmp_path / "next") == losses(tmp_path / "run")
    # The store can be extended further.
    worker = ShardWorker(stores.job_for(grown, StoreReader(grown).spec, data_dir, teacher_path))
    stores.write_store(worker, epochs=8, views_per_shard=20, eval_splits=())
    assert StoreReader(grown).epochs == 8


@pytest.mark.slow
@pytest.mark.usefixtures("deterministic")
def test_endless_run_that_is_stopped_and_continued_publishes_whole_epochs(
    argv: list[str], grown: Path, precompute: Precompute, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    flags = [*argv, "--epochs=inf", "--views_per_shard=1000"]
    assert run_until(12, flags, tmp_path / "run") == EXIT_TERMINATED  # 60 views, three epochs and more
    held = StoreReader(grown).epochs
    assert held >= 3
    assert f"which has {held} now" in capsys.readouterr().out
    assert run_until(25, flags, tmp_path / "run") == EXIT_TERMINATED
    assert "running the teacher again on" in capsys.readouterr().out
    reached = StoreReader(grown).epochs
    assert reached >= 7
    expected = precompute(held, reached, views_per_shard=1000)
    assert_same_store(grown, expected)
    assert [line["step"] for line in metrics(tmp_path / "run", "train")] == list(
        range(1, max(losses(tmp_path / "run")) + 1)
    )


@pytest.mark.slow
@pytest.mark.parametrize("moment", [9, 16, 30])
def test_killed_run_continues_and_the_store_is_the_same(
    argv: list[str], grown: Path, precompute: Precompute, tmp_path: Path, moment: int
):
    flags = [*argv, "--epochs=12", "--views_per_shard=40", "--checkpoint_every=7"]
    process = subprocess.Popen(
        command(flags), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    path, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
    while not (path.exists() and f'"step": {moment},' in path.read_text()):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    expected = precompute(12, views_per_shard=2 * N)
    assert assert_whole(grown, expected) < 12
    run_process(flags)
    if StoreReader(grown).epochs == 12:
        assert_whole(grown, expected)
    assert list(losses(tmp_path / "run")) == list(range(1, 12 * N // 5 + 1))
    assert_same_store(grown, expected)


def test_lost_views_are_recomputed_or_refused(
    argv: list[str], grown: Path, precompute: Precompute, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    plain = [flag for flag in argv if flag != "--write_back"]
    start_run([*plain, "--steps=14"]).checkpoints.save(14)
    before = published_files(grown)
    code, line = fail([*argv, "--steps=17", "--views_per_shard=40"], capsys)
    assert code == EXIT_USER_ERROR
    for words in ("--write_back", "view 70", "view 17", "--epochs=5"):
        assert words in line
    assert published_files(grown) == before
    assert main([*argv, "--steps=17", "--views_per_shard=60"]) == 0
    assert "53 views" in capsys.readouterr().out
    assert_same_store(grown, precompute(5, views_per_shard=3 * N))


def test_store_is_locked_for_writers_and_open_to_readers(
    argv: list[str], grown: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with writer_lock(grown):
        code, line = fail([*argv, "--epochs=2"], capsys)
        assert code == EXIT_USER_ERROR
        assert f"process {os.getpid()}" in line
        assert start_run(arguments(grown, tmp_path / "reader", data_dir)).train()["steps"] == 3
    code, line = fail([flag.replace(str(grown), str(tmp_path / "nowhere")) for flag in argv], capsys)
    assert code == EXIT_USER_ERROR
    assert not (tmp_path / "nowhere").exists()


def test_teacher_with_other_logits_is_refused(
    argv: list[str], grown: Path, capsys: pytest.CaptureFixture[str]
):
    forge_smallest_logit(grown, 1.5)
    before = published_files(grown)
    code, line = fail([*argv, "--steps=7"], capsys)
    assert code == EXIT_DATA_ERROR
    assert "--write_back: " in line
    assert "13..16" in line
    assert published_files(grown) == before


def test_mistakes_are_refused(argv: list[str], capsys: pytest.CaptureFixture[str]):
    without_teacher = [flag for flag in argv if not flag.startswith("--teacher")]
    code, line = fail([*without_teacher, "--steps=2"], capsys)
    assert code == EXIT_USER_ERROR
    assert "--write_back: needs --teacher" in line
    code, line = fail([*argv, "--steps=9", "--steps_per_execution=3"], capsys)
    assert code == EXIT_USER_ERROR
    assert "--write_back: " in line
    assert "--steps_per_execution=3" in line
    code, line = fail([*argv, "--steps=9", "--jit_compile"], capsys)
    assert code == EXIT_USER_ERROR
    assert "--write_back: --jit_compile" in line


@pytest.mark.slow  # a process of its own, for its devices
def test_replicas_are_refused(argv: list[str], grown: Path, capsys: pytest.CaptureFixture[str]):
    flags = [*argv, "--steps=9", "--batch_size=4", "--strategy=mirrored", "--replicas=2"]
    done = subprocess.run(command(flags), cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == EXIT_USER_ERROR
    assert "error: --write_back: got 2 replicas" in done.stderr
