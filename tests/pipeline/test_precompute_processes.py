"""pipeline.precompute as a process: output, kills and continuation, other runners."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import UserError
from pipeline.precompute import main
from pipeline.precomputing.worker import ShardWorker
from pipeline.store.reader import StoreReader
from pipeline.store.spec import Spec
from tests.stores import Asked, N, assert_whole, job_for, make_spec, shard_files, write_store

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "pipeline.precompute"]
SEVERAL = ["--direct_running_mode=multi_processing", "--direct_num_workers=2"]


class Command(subprocess.Popen[str]):
    """A process that is killed when a test fails."""

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        if kind is not None:
            self.kill()
        super().__exit__(kind, *rest)


def start(flags: list[str], *, group: bool = False) -> Command:
    return Command(
        [*COMMAND, *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=group,
    )


def without_bar(stderr: str) -> list[str]:
    """Lines on standard error without the progress bars."""
    lines = stderr.replace("\r", "\n").splitlines()
    return [line for line in lines if line.strip() and not line.startswith(("precompute: ", "top-1 on "))]


def test_an_error_in_the_middle_exits_3_with_the_bar_and_one_line_on_standard_error(
    asked: Asked, breaking_teacher: Path
) -> None:
    """Without logs of TensorFlow and Beam, and without the traceback that Beam logs."""
    with start(dataclasses.replace(asked, teacher=breaking_teacher).flags()) as process:
        stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 3
    (line,) = without_bar(stderr)
    assert re.match(
        rf"error: .*{breaking_teacher}.*logit 0 of view \d+ \(example \d+, .* nan",
        line,
    )
    assert "\nto compute: 51 views and evaluation crops of test (7), in 4 shards" in stdout


EPOCHS, SHARD, LARGE_BATCH = 200, 1200, 32  # 3,400 views in three shards of about a second
LONGER = [f"--epochs={EPOCHS}", f"--views_per_shard={SHARD}", f"--teacher_batch_size={LARGE_BATCH}"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, data_dir: Path, teacher_path: Path) -> Path:
    """A longer store, written without interruption and without Beam."""
    store = tmp_path_factory.mktemp("undisturbed") / "store"
    longer = make_spec(data_dir, teacher_path, batch_size=LARGE_BATCH)
    worker = ShardWorker(job_for(store, longer, data_dir, teacher_path, cache_bytes=1 << 30))
    write_store(worker, epochs=EPOCHS, views_per_shard=SHARD)
    return store


def in_flight(store: Path) -> set[str]:
    """Names of the shards of views that are being written."""
    temporaries = store.glob(".tmp-views.array_record-*")
    return {path.name.removeprefix(".tmp-").rsplit("-", 2)[0] for path in temporaries}


def killed_in_the_middle(flags: list[str], store: Path) -> None:
    """Runs the command and kills it when one shard of views is on disk and the next one is being written."""
    process = start(flags)
    with process:
        try:
            deadline = time.monotonic() + 200
            while True:
                assert process.poll() is None, f"ended before it could be killed: {process.communicate()[1]}"
                assert time.monotonic() < deadline, "no shard in 200 s"
                # Not the first shard alone, under both of its names: its note, by which it is adopted, comes after them.
                finished = {path.name for path in store.glob("views.array_record-*")}
                if finished and in_flight(store) - finished:
                    break
                time.sleep(0.002)
        finally:
            process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL


def check_killed_and_continued(store: Path, undisturbed: Path, resume: Iterator[None]) -> None:
    finished = {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in store.glob("views.array_record-*")}
    assert finished
    assert in_flight(store)
    # Whole epochs are published, if the poll found the first shard before the kill.
    with contextlib.suppress(UserError):
        assert assert_whole(store, undisturbed) >= SHARD // N
    next(resume, None)
    assert shard_files(store) == shard_files(undisturbed)
    for name in ("manifest.json", "dataset_info.json", "features.json", "eval/manifest.json"):
        assert (store / name).read_bytes() == (undisturbed / name).read_bytes(), name
    assert Spec.load(store).digest() == Spec.load(undisturbed).digest()
    # Adopted: the finished shards were not written again.
    assert {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in finished} == finished
    assert not list(store.glob(".tmp-*"))
    assert not (store / "pending").exists()
    StoreReader(store).views.read(np.arange(EPOCHS * N))


def test_a_run_killed_in_the_middle_continues_to_the_same_bytes(asked: Asked, undisturbed: Path) -> None:
    """SIGKILL with at least one finished shard and one in flight; then the same command."""
    flags = asked.flags(*LONGER)
    killed_in_the_middle(flags, asked.store)

    def resume() -> Iterator[None]:
        assert main(flags) == 0
        yield

    check_killed_and_continued(asked.store, undisturbed, resume())


@pytest.mark.slow
def test_other_runners_and_several_processes_write_the_same_bytes(asked: Asked, undisturbed: Path) -> None:
    """Killed under DirectRunner, continued by two worker processes."""
    flags = asked.flags(*LONGER)
    killed_in_the_middle([*flags, "--runner=DirectRunner"], asked.store)

    def resume() -> Iterator[None]:
        with start([*flags, *SEVERAL]) as process:
            _, stderr = process.communicate(timeout=500)
        assert process.returncode == 0, stderr
        assert without_bar(stderr) == []
        yield

    check_killed_and_continued(asked.store, undisturbed, resume())


@pytest.mark.slow
@pytest.mark.parametrize("runner", ["DirectRunner", "PortableRunner"])
def test_a_whole_run_on_another_runner(asked: Asked, published_store: Path, runner: str) -> None:
    """PortableRunner with its embedded job service is the closest to Prism."""
    flags = [f"--runner={runner}"]
    if runner == "PortableRunner":
        flags += ["--job_endpoint=embed", "--environment_type=LOOPBACK"]
    with start([*asked.flags(), *flags]) as process:
        _, stderr = process.communicate(timeout=500)
    assert process.returncode == 0, stderr
    assert shard_files(asked.store) == shard_files(published_store)


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    """Process IDs of the workers of a command."""
    children = Path(f"/proc/{process.pid}/task").glob("*/children")
    pids = [int(pid) for listed in children for pid in listed.read_text().split()]
    return [
        pid for pid in pids if "pipeline.precomputing.beam_worker" in Path(f"/proc/{pid}/cmdline").read_text()
    ]


def until_a_shard_is_written(process: subprocess.Popen[str], store: Path) -> None:
    deadline = time.monotonic() + 300
    while not list(store.glob(".tmp-views.array_record-*")):
        assert process.poll() is None, f"ended too early: {process.communicate()[1]}"
        assert time.monotonic() < deadline, "no shard in 300 s"
        time.sleep(0.02)


@pytest.mark.slow
def test_the_traceback_of_a_worker_process_is_shown_for_debugging(
    asked: Asked, breaking_worker_teacher: Path
) -> None:
    flags = dataclasses.replace(asked, teacher=breaking_worker_teacher).flags(
        *SEVERAL, "--direct_num_workers=1"
    )
    with start([*flags, "--debug"]) as process:
        _, stderr = process.communicate(timeout=500)
    assert process.returncode == 3
    *lines, last = without_bar(stderr)
    assert last.startswith("error: ")
    assert any("sdk_worker.py" in line for line in lines)
    assert any("pipeline/precomputing/worker.py" in line for line in lines)


@pytest.mark.slow
def test_an_error_in_a_worker_process_is_one_line(asked: Asked, breaking_worker_teacher: Path) -> None:
    """With one worker, so that it calls the teacher often enough."""
    flags = dataclasses.replace(asked, teacher=breaking_worker_teacher).flags(
        *SEVERAL, "--direct_num_workers=1"
    )
    with start(flags) as process:
        _, stderr = process.communicate(timeout=500)
    assert process.returncode == 3
    (line,) = without_bar(stderr)
    assert re.match(
        rf"error: .*{breaking_worker_teacher}.*logit 0 of view \d+ \(example \d+, .* nan",
        line,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("send", "number", "word"),
    [
        (os.killpg, signal.SIGINT, "interrupted"),
        (os.kill, signal.SIGINT, "interrupted"),
        (os.kill, signal.SIGTERM, "SIGTERM"),
    ],
    ids=["ctrl_c", "sigint", "sigterm"],
)
def test_a_signal_is_one_line_and_ends_worker_processes(
    asked: Asked, send: Callable[[int, int], None], number: signal.Signals, word: str
) -> None:
    """Ctrl-C in a terminal reaches the whole process group; a supervisor signals only the command."""
    with start(asked.flags(*SEVERAL, "--epochs=30000", "--views_per_shard=100000"), group=True) as process:
        until_a_shard_is_written(process, asked.store)
        workers = workers_of(process)
        assert len(workers) == 2
        send(process.pid, number)
        _, stderr = process.communicate(timeout=100)
    assert process.returncode == 128 + number
    (line,) = without_bar(stderr)
    assert line.startswith(word)
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]


@pytest.mark.slow
def test_worker_processes_end_with_a_command_that_is_killed(asked: Asked) -> None:
    with start(asked.flags(*SEVERAL, "--epochs=30000", "--views_per_shard=100000")) as process:
        until_a_shard_is_written(process, asked.store)
        workers = workers_of(process)
        assert len(workers) == 2
        process.kill()
        process.communicate(timeout=100)
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline, "still there after 20 s"
        time.sleep(0.05)


def test_sigterm_in_the_middle_exits_143_in_one_line(asked: Asked) -> None:
    with start(asked.flags("--epochs=30000", "--views_per_shard=100000")) as process:
        until_a_shard_is_written(process, asked.store)
        process.terminate()
        _, stderr = process.communicate(timeout=100)
    assert process.returncode == 143, stderr
    (line,) = without_bar(stderr)
    assert line.startswith("SIGTERM")


@pytest.mark.slow
def test_a_killed_worker_process_ends_the_run_with_a_message(asked: Asked) -> None:
    """As the kernel does when memory runs out. Beam's own traceback stays."""
    flags = asked.flags(*SEVERAL, "--direct_num_workers=1", "--epochs=30000", "--views_per_shard=100000")
    with start(flags) as process:
        until_a_shard_is_written(process, asked.store)
        (worker,) = workers_of(process)
        os.kill(worker, signal.SIGKILL)
        _, stderr = process.communicate(timeout=100)
    assert process.returncode == 2
    assert stderr.splitlines()[-1].startswith("error: a worker process was killed")
