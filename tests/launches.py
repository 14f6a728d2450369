"""Launches of a job on the simulated cloud: flags, a trainer without work, and the end of a command."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import pytest

from pipeline.cli.main import run_command
from trainer.cloud import check_store, tpu_job
from trainer.launch import main

PLACE = ("--tpu=flowers", "--zone=us-central1-a", "--project=mine")
STORE, DATA, RUN = "gs://bucket/store", "gs://bucket/data", "gs://bucket/runs/one"
PULLED = "--image=us-central1-docker.pkg.dev/mine/view-distill/trainer:tpu"
STOP = "python -m trainer.launch stop --tpu=flowers --zone=us-central1-a --project=mine --delete"

HOST_SCRIPT = Path(tpu_job.__file__).parent / "templates" / "tpu_host.sh"

# Replaces the trainer: ten steps, each saved. At step 5 it waits for a file `go`.
TRAINER = """#!/usr/bin/env bash
[[ -f inputs/store/spec.json && -d inputs/data_dir ]] || { echo "error: no store"; exit 2; }
[[ "$*" != *--seed=13* ]] || { echo "error: unlucky"; exit 3; }
[[ "$*" != *--seed=9* ]] || kill -KILL $$
trap 'echo saved; exit 143' TERM
mkdir -p work/checkpoints
step=$(cat work/step 2> /dev/null || echo 0)
echo "from step $step"
while ((step < 10)); do
    step=$((step + 1))
    echo "$step" > work/step
    touch "work/ckpt-$step.index"
    echo "{\\"step\\": $step}" >> work/metrics.jsonl
    echo "ckpt-$step" > work/checkpoints/checkpoint
    echo "step $step"
    while [[ $step == 5 && ! -f "$FAKE_CLOUD/go" ]]; do sleep 0.05; done
done
echo finished
"""


def launch(*extra: str, trainer: tuple[str, ...] = ()) -> list[str]:
    """Arguments of a launch. A store in `extra` takes the place of the usual one."""
    own = not any(flag.startswith("--store=") for flag in extra)
    return [
        *(
            "launch",
            *PLACE,
            "--type=v3-8",
            PULLED,
            *([f"--store={STORE}"] if own else []),
            f"--data_dir={DATA}",
            f"--workdir={RUN}",
        ),
        *("--save_seconds=1", "--poll_seconds=0", *extra, "--", "--batch_size=8", *trainer),
    ]


def ended(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Runs the command; returns exit code, output, and the last line of standard error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        run_command(main, argv)
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    assert isinstance(exit_info.value.code, int)
    return exit_info.value.code, printed.out, (printed.err.splitlines() or [""])[-1]


def run_check_here(argv: list[str]) -> tuple[int, str, str]:
    """Replaces `trainer.cloud.preflight.run_check` without starting a process."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as exit_info,
    ):
        run_command(check_store.main, argv)
    assert isinstance(exit_info.value.code, int)
    return exit_info.value.code, out.getvalue(), err.getvalue()
