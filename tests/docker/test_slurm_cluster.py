"""docker/slurm_cluster.py: its job script, and a whole precompute with programs in place of sbatch and scancel."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import runpy
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.documents import ROOT, command_lines
from tests.stores import Asked, shard_files

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("dask_jobqueue") is None, reason="the extra `dask` is not installed"
)

SCRIPT = ROOT / "docker" / "slurm_cluster.py"
RUNNER = "--runner=apache_beam.runners.dask.dask_runner.DaskRunner"
# A job is a process group with the job's ID. Like SLURM, it runs a copy of the script, which dask-jobqueue removes at once.
SBATCH = """#!/bin/sh
cp "$1" "$SLURM_JOBS/script.$$"
setsid bash "$SLURM_JOBS/script.$$" > "$SLURM_JOBS/log.$$" 2>&1 &
echo "$!" >> "$SLURM_JOBS/submitted"
echo "Submitted batch job $!"
"""
SCANCEL = '#!/bin/sh\nfor job in "$@"; do kill -TERM -- "-$job"; done\n'


@pytest.fixture(scope="module")
def script() -> dict:
    # dask_jobqueue handles both signals of the process that imports it.
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    names = runpy.run_path(str(SCRIPT))
    for number, handler in before.items():
        signal.signal(number, handler)
    return names


def parsed(script: dict, *argv: str) -> argparse.Namespace:
    flags: argparse.Namespace = script["make_parser"]().parse_args(argv)
    return flags


def test_job_script_has_what_the_flags_ask_for(script: dict, tmp_path: Path) -> None:
    flags = parsed(
        script,
        *("--queue=gpu", "--account=mine", "--walltime=01:30:00", "--cpus=6", "--memory=32GiB", "--gpus=2"),
        *("--interface=lo", f"--scheduler_file={tmp_path}/dask.json"),
    )
    with script["make_cluster"](flags) as cluster:
        text = cluster.job_script()
        address = cluster.scheduler_address
        assert address in (tmp_path / "dask.json").read_text()
    header = {line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")}
    assert {"-p gpu", "-A mine", "-t 01:30:00", "--cpus-per-task=6", "--mem=32G", "--gres=gpu:2"} <= header
    assert "-n 1" in header
    (command,) = [shlex.split(line) for line in text.splitlines() if line and not line.startswith("#")]
    assert command[:4] == [sys.executable, "-m", "distributed.cli.dask_worker", address]
    assert command[command.index("--nthreads") + 1] == "1"
    assert "--nworkers" not in command
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


def test_commands_of_the_page_are_taken(script: dict) -> None:
    commands = [shlex.split(line) for line in command_lines(ROOT / "docs" / "clusters.md")]
    found = [words[2:] for words in commands if words[:2] == ["python", "docker/slurm_cluster.py"]]
    assert len(found) == 2
    flags = [parsed(script, *argv) for argv in found]
    assert [given.print_job for given in flags] == [True, False]
    (precompute,) = [words for words in commands if "--shared_filesystem" in words]
    assert f"--dask_scheduler_file={flags[1].scheduler_file}" in precompute
    assert RUNNER in precompute


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory with the IDs and logs of the submitted jobs, which are killed at the end."""
    directory, programs = tmp_path / "jobs", tmp_path / "bin"
    directory.mkdir()
    programs.mkdir()
    for name, text in {"sbatch": SBATCH, "scancel": SCANCEL}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("SLURM_JOBS", str(directory))
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    yield directory
    for job in submitted(directory):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job, signal.SIGKILL)


def submitted(jobs: Path) -> list[int]:
    path = jobs / "submitted"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def is_running(job: int) -> bool:
    try:
        os.killpg(job, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_a_precompute_survives_a_killed_job_and_has_the_bytes_of_a_local_run(
    jobs: Path, data_dir: Path, teacher_path: Path, tmp_path: Path
) -> None:
    asked, local = (Asked(data_dir, teacher_path, tmp_path / name) for name in ("dask", "local"))
    file = tmp_path / "dask.json"
    cluster = [sys.executable, SCRIPT, "--jobs=2", "--interface=lo", f"--scheduler_file={file}"]
    # Paths of this machine are seen by workers of this machine.
    flags = asked.flags(RUNNER, f"--dask_scheduler_file={file}", "--views_per_shard=4")
    with subprocess.Popen(cluster, cwd=tmp_path, stdout=subprocess.DEVNULL) as scheduler:
        end = time.monotonic() + 900
        while not file.exists() or len(submitted(jobs)) < 2:
            assert scheduler.poll() is None
            assert time.monotonic() < end, "no jobs"
            time.sleep(0.1)
        command = [sys.executable, "-m", "pipeline.precompute", *flags]
        with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
            while not list(asked.store.rglob("*.array_record-*")):
                assert process.poll() is None, process.communicate()[1]
                time.sleep(0.02)
            os.killpg(submitted(jobs)[0], signal.SIGKILL)
            _, err = process.communicate(timeout=1000)
        assert process.returncode == 0, err[-3000:]
        scheduler.send_signal(signal.SIGINT)
        assert scheduler.wait(timeout=300) == 0
    end = time.monotonic() + 60
    while any(is_running(job) for job in submitted(jobs)):
        assert time.monotonic() < end, "jobs are left"
        time.sleep(0.1)
    assert len(shard_files(asked.store)) == 13 + 2
    command = [sys.executable, "-m", "pipeline.precompute", *local.flags("--views_per_shard=4")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert shard_files(asked.store) == shard_files(local.store)
