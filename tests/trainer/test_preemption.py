"""trainer.preemption: SIGTERM saves, exits 143, and the run goes on where it was."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.runs import environment
from trainer.preemption import EXIT_PREEMPTED, Preemption


def test_sigterm_is_noted_inside_and_as_before_outside():
    before = signal.getsignal(signal.SIGTERM)
    with Preemption() as preemption:
        assert not preemption.requested
        signal.raise_signal(signal.SIGTERM)
        assert preemption.requested
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.slow
def test_terminated_run_saves_and_the_same_command_finishes_it(
    published_store: Path, data_dir: Path, tmp_path: Path
):
    workdir = tmp_path / "run"
    command = [
        *(sys.executable, "-m", "trainer.train", f"--store={published_store}", f"--data_dir={data_dir}"),
        *(f"--workdir={workdir}", "--student=tiny", "--batch_size=4", "--log_every=1", "--eval_every=3"),
        "--checkpoint_every=1000",
    ]
    with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        metrics = workdir / "metrics.jsonl"
        while not (metrics.exists() and '"step": 2' in metrics.read_text()):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, text = process.communicate()
    assert process.returncode == EXIT_PREEMPTED, text[-2000:]
    assert "SIGTERM: saved at step" in text.splitlines()[-1]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "continuing at step" in done.stdout
    lines = list(map(json.loads, metrics.read_text().splitlines()))
    steps = [line["step"] for line in lines if line["kind"] == "train"]
    assert steps == list(range(1, 13))
    assert [line["step"] for line in lines if line["kind"] == "eval_test"] == [3, 6, 9, 12]
