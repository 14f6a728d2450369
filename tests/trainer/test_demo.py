"""trainer.demo: all stages on the embedded default, the same as `make demo`."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.runs import ROOT, environment, fail
from trainer.demo import run_stage


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("beam")
def test_demo_prints_a_table_of_its_measurements(tmp_path: Path):
    argv = [sys.executable, "-m", "trainer.demo", f"--workdir={tmp_path / 'demo'}"]
    env = {**environment(), "VIEW_DISTILL_CACHE": str(tmp_path / "cache")}

    def run() -> tuple[str, float]:
        started = time.monotonic()
        done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout, time.monotonic() - started

    output, seconds = run()
    test = json.loads((tmp_path / "demo" / "student" / "result.json").read_text())["evaluation"]["test"]
    assert test["teacher_top1"] >= 0.97
    assert test["student_top1"] >= 0.93
    assert test["agreement"] >= 0.93
    table = dict(re.findall(r"^  (\S.*?) {2,}(\S+)$", output, flags=re.MULTILINE))
    assert f"{test['student_top1']:.1%}" in table.values()
    assert f"{test['teacher_top1']:.1%}" in table.values()
    assert f"{test['agreement']:.1%}" in table.values()
    assert len([label for label in table if "seconds" in label]) >= 2
    assert [label for label in table if "bytes" in label]
    assert "pipeline.precompute --runner=DirectRunner" in output
    (pair,) = json.loads((tmp_path / "demo" / "compare" / "result.json").read_text())["pairs"]
    assert pair["largest_loss_difference"] == pair["weights_largest_difference"] == 0
    report = tmp_path / "demo" / "compare" / "report.html"
    assert output.rstrip().endswith(str(report))
    assert report.exists()
    again, again_seconds = run()
    assert f"{test['student_top1']:.1%}" in again
    assert again_seconds < seconds  # finished stages are not repeated


STAGE = """
import signal, sys, time
def save(*_):
    time.sleep(1)
    print("saved", flush=True)
    sys.exit(130)
signal.signal(signal.SIGINT, save)
print("at work", flush=True)
time.sleep(60)
"""


def test_ctrl_c_lets_a_stage_save():
    code = f"from trainer.demo import run_stage; run_stage('train', ['-c', {STAGE!r}]); print('went on')"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        while process.stdout.readline() != "at work\n":
            assert process.poll() is None
        os.killpg(process.pid, signal.SIGINT)
        assert process.stdout.read() == "saved\n"
    assert process.returncode == 130


def test_sigterm_is_forwarded_to_the_stage():
    stage = STAGE.replace("SIGINT", "SIGTERM").replace("130", "143")
    code = f"from trainer.demo import run_stage; run_stage('train', ['-c', {stage!r}]); print('went on')"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        while process.stdout.readline() != "at work\n":
            assert process.poll() is None
        process.terminate()  # this process only
        assert process.stdout.read() == "saved\n"
    assert process.returncode == 143


def test_killed_stage_is_reported_with_its_exit_code(capsys: pytest.CaptureFixture[str]):
    def main(argv: list[str]) -> None:
        run_stage("train", ["-c", "import os; os.kill(os.getpid(), 9)"])

    code, line = fail([], capsys, main=main)
    assert code == 137
    assert line.startswith("error: train: ")
    assert "SIGKILL" in line


def test_exit_code_of_a_failed_stage_is_kept():
    with pytest.raises(SystemExit) as ended:
        run_stage("train", ["-c", "raise SystemExit(75)"])
    assert ended.value.code == 75
