"""pipeline.precompute on a real distributed engine: Dask, a scheduler and two workers over loopback."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.stores import Asked, shard_files

ROOT = Path(__file__).resolve().parents[2]
RUNNER = "--runner=apache_beam.runners.dask.dask_runner.DaskRunner"

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("beam")]


class Cluster:
    """A scheduler and two workers as separate processes."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._processes: list[subprocess.Popen[bytes]] = []
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
        self._start("scheduler", f"--host={self.address}")
        deadline = time.monotonic() + 100
        host, _, port = self.address.removeprefix("tcp://").partition(":")
        while True:
            with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=5):
                break
            assert time.monotonic() < deadline, "no scheduler in 100 s"
            time.sleep(0.1)
        self.workers = [self.start_worker(number) for number in range(2)]

    def _start(self, role: str, *flags: str, name: str = "") -> subprocess.Popen[bytes]:
        with (self._directory / f"{name or role}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "dask", role, "--no-dashboard", *flags],
                cwd=ROOT,
                stdout=log,
                stderr=log,
            )
        self._processes.append(process)
        return process

    def start_worker(self, number: int) -> subprocess.Popen[bytes]:
        """Starts a worker with one thread, without the nanny that restarts killed workers."""
        flags = ("--nthreads=1", "--no-nanny", f"--local-directory={self._directory}")
        return self._start("worker", self.address, *flags, name=f"worker{number}")

    def flags(self) -> list[str]:
        """Flags of the precompute."""
        return [RUNNER, f"--dask_client_address={self.address}"]

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    pytest.importorskip("distributed", reason="the extra `dask` is not installed")
    (tmp_path / "cluster").mkdir()
    cluster = Cluster(tmp_path / "cluster")
    yield cluster
    cluster.stop()


def start(flags: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.precompute", *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_dask_workers_write_the_same_bytes(cluster: Cluster, asked: Asked, published_store: Path) -> None:
    with start(asked.flags(*cluster.flags())) as process:
        _, stderr = process.communicate(timeout=1500)
    assert process.returncode == 0, stderr
    assert shard_files(asked.store) == shard_files(published_store)


def test_a_killed_dask_worker_loses_only_its_shard(
    cluster: Cluster, asked: Asked, published_store: Path
) -> None:
    """Dask moves its tasks to the other worker."""
    with start(asked.flags(*cluster.flags())) as process:
        deadline = time.monotonic() + 900
        while not list(asked.store.rglob("*.array_record-*")):
            assert process.poll() is None, f"ended too early: {process.communicate()[1]}"
            assert time.monotonic() < deadline, "no shard"
            time.sleep(0.01)
        os.kill(cluster.workers[0].pid, signal.SIGKILL)
        _, stderr = process.communicate(timeout=1500)
    assert process.returncode == 0, stderr
    assert shard_files(asked.store) == shard_files(published_store)
