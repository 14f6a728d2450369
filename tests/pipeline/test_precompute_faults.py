"""A short campaign of faults, in a separate process that has not used TensorFlow, because it forks."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow  # three minutes of both cores
def test_disturbed_precomputes_end_in_the_same_bytes(tmp_path: Path) -> None:
    flags = [
        "--kills=2",
        "--every_step=16",
        "--every_request=9",
        "--disks=1",
        "--pairs=2",
        "--orphans=1",
        f"--directory={tmp_path}",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "tests.campaigns.precompute_faults", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    assert "2 random kills (" in last
    steps = re.search(r"(\d+) kills between steps of publishing", last)
    assert steps is not None
    assert int(steps[1]) >= 4
    assert re.search(r"[1-9]\d* between requests to a bucket", last)
    assert "2 simultaneous pairs, 1 main processes killed" in last
