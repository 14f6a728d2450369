"""trainer.run.following: a run on a growing store equals a run on the finished store."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tensorflow as tf
from tensorflow.python.framework.config import disable_op_determinism

from pipeline.errors import DataError, Interrupted, UserError
from pipeline.precomputing.worker import ShardWorker
from pipeline.storage.bucket import BucketDirectory
from pipeline.storage.lease import hold_lease
from pipeline.storage.lock import LOCK_FILE, is_locked, writer_lock
from pipeline.storage.writer_watch import WriterWatch
from pipeline.store.metadata import INFO_FILE
from pipeline.store.reader import StoreReader
from pipeline.store.spec import Spec
from tests.buckets import BUCKET, put_object, upload_tree
from tests.runs import (
    arguments,
    assert_same_weights,
    checkpoint_weights,
    command,
    environment,
    fail,
    losses,
    metrics,
    run_process,
    start_run,
)
from tests.stores import Asked, N, job_for, write_store
from tests.students import MINIMAL
from trainer.run import following
from trainer.train import main

ROOT = Path(__file__).resolve().parents[3]
RUN = (
    f"--student={MINIMAL}",
    "--epochs=3",
    "--eval_every=4",
    "--eval_split=test",
    "--warmup_steps=2",
    "--log_every=1",
)


@pytest.fixture(autouse=True)
def poll(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "POLL_SECONDS", 0.1)


@pytest.fixture
def worker(tmp_path: Path, spec: Spec, data_dir: Path, teacher_path: Path) -> ShardWorker:
    return ShardWorker(job_for(tmp_path / "growing", spec, data_dir, teacher_path))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, published_store: Path, data_dir: Path) -> Path:
    """Work directory of a run on the finished store; read-only."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    tf.config.experimental.enable_op_determinism()
    start_run(arguments(published_store, workdir, data_dir, *RUN)).train()
    disable_op_determinism()
    return workdir


def assert_same_run(workdir: Path, expected: Path) -> None:
    """Asserts that weights, optimizer state, losses and evaluations are bit-equal."""
    for name in ("checkpoints", "checkpoints/best"):
        ours, theirs = checkpoint_weights(workdir, name), checkpoint_weights(expected, name)
        assert ours.keys() == theirs.keys()
        assert_same_weights(list(ours.values()), [theirs[key] for key in ours])
    assert losses(workdir) == losses(expected)
    assert metrics(workdir, "eval_test") == metrics(expected, "eval_test")


@contextlib.contextmanager
def written(store: Path, write: Callable[[], None]) -> Iterator[None]:
    """A writer in a thread, which holds the lock."""

    def work() -> None:
        with writer_lock(store):
            locked.set()
            write()

    store.mkdir(exist_ok=True)
    locked = threading.Event()
    thread = threading.Thread(target=work)
    thread.start()
    locked.wait()
    try:
        yield
    finally:
        thread.join()


def wait_for_checkpoint(workdir: Path, step: int) -> None:
    """Waits until a run waits after this step."""
    deadline = time.monotonic() + 200
    while not (workdir / "checkpoints" / f"ckpt-{step}.index").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.usefixtures("deterministic")
def test_run_waits_for_each_epoch_and_equals_one_on_the_finished_store(
    tmp_path: Path, worker: ShardWorker, data_dir: Path, finished: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Starts before the first epoch. A step has 5 views and an epoch 17, so that the run waits inside intervals."""
    store, workdir = Path(worker.job.store), tmp_path / "run"

    def write() -> None:
        time.sleep(0.5)
        write_store(worker, epochs=1)
        for epochs, step in ((2, 3), (3, 6)):  # last step with published views before
            wait_for_checkpoint(workdir, step)
            write_store(worker, epochs=epochs)

    with written(store, write):
        assert main(arguments(store, workdir, data_dir, *RUN, "--follow")) == 0
    out, err = capfd.readouterr()
    assert "waiting for the first epoch" in out
    assert "waiting for epoch 2 of 3" in err
    assert "waiting for epoch 3 of 3" in err
    assert_same_run(workdir, finished)


@pytest.mark.usefixtures("deterministic")
def test_run_ends_without_a_writer_and_continues_on_a_larger_store(
    tmp_path: Path,
    worker: ShardWorker,
    data_dir: Path,
    finished: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The exit code is 75, and the run is saved. On a finished store it trains like any run."""
    store, workdir = Path(worker.job.store), tmp_path / "run"
    argv = arguments(store, workdir, data_dir, *RUN, "--follow")
    code, line = fail(argv, capsys, main=main)
    assert (code, "--follow" in line or "spec.json" in line) == (2, True)
    write_store(worker, epochs=1)
    code, line = fail(argv, capsys, main=main)
    assert code == 75
    assert "1 of the 3 epochs" in line
    assert "saved at step 3" in line
    write_store(worker, epochs=3)
    assert main(argv) == 0
    assert "continuing at step 3 of 10" in capsys.readouterr().out
    assert_same_run(workdir, finished)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_signal_while_waiting_ends_a_saved_run(
    tmp_path: Path, worker: ShardWorker, data_dir: Path, number: signal.Signals
) -> None:
    store, workdir = Path(worker.job.store), tmp_path / "run"
    write_store(worker, epochs=1)

    def send() -> None:
        wait_for_checkpoint(workdir, 3)
        time.sleep(0.3)
        os.kill(os.getpid(), number)

    with written(store, send), pytest.raises(Interrupted, match="saved at step 3") as stop:
        main(arguments(store, workdir, data_dir, *RUN, "--follow"))
    assert stop.value.exit_code == 128 + number


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), "neither --epochs nor --steps"),
        (("--epochs=inf",), "--epochs=inf"),
        (("--epochs=3", "--teacher=somewhere"), "--teacher=somewhere"),
        (("--epochs=3", "--arm=online"), "--arm=online"),
    ],
    ids=["no_length", "endless", "teacher", "arm"],
)
def test_conflicting_flags_are_refused(
    tmp_path: Path,
    three_epochs: Path,
    data_dir: Path,
    flags: tuple[str, ...],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, line = fail(
        arguments(three_epochs, tmp_path / "run", data_dir, "--follow", *flags), capsys, main=main
    )
    assert code == 2
    assert "--follow" in line
    assert words in line


def test_store_that_loses_its_metadata_while_open_is_refused(tmp_path: Path, one_epoch: Path) -> None:
    store = Path(shutil.copytree(one_epoch, tmp_path / "store"))
    opened = StoreReader(store)
    (store / INFO_FILE).unlink()
    with pytest.raises(DataError) as error:
        opened.refresh()
    assert str(store) in str(error.value)


@pytest.fixture
def remote(s3: str, s3_port: int, published_store: Path) -> str:
    """The published store in a bucket, with its first shard published: an epoch and three views."""
    prefix = s3.removeprefix(f"s3://{BUCKET}/")
    upload_tree(s3_port, published_store, prefix)
    info = json.loads((published_store / INFO_FILE).read_text())
    info["splits"][0]["shardLengths"] = ["20"]
    put_object(s3_port, f"{prefix}/{INFO_FILE}", json.dumps(info).encode())
    return s3


@pytest.mark.usefixtures("deterministic")
def test_run_follows_a_store_in_a_bucket(
    tmp_path: Path, remote: str, published_store: Path, data_dir: Path, finished: Path
) -> None:
    bucket, workdir = BucketDirectory(remote), tmp_path / "run"

    def publish() -> None:
        with hold_lease(bucket):
            locked.set()
            wait_for_checkpoint(workdir, 3)
            bucket.write(INFO_FILE, (published_store / INFO_FILE).read_bytes())
            wait_for_checkpoint(workdir, 10)

    locked = threading.Event()
    thread = threading.Thread(target=publish)
    thread.start()
    locked.wait()
    try:
        # Another owner than this process, whose own locks are known at once.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("pipeline.storage.writer_watch.is_dead", lambda owner: False)
            argv = arguments(Path("none"), workdir, data_dir, *RUN, "--follow")[1:]
            assert main([*argv, f"--store={remote}"]) == 0
    finally:
        thread.join()
    assert_same_run(workdir, finished)


def test_bucket_lock_that_is_not_renewed_counts_as_released(
    tmp_path: Path,
    remote: str,
    data_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    owner = {"pid": 1, "host": "elsewhere", "machine": "another", "lease": "another"}
    BucketDirectory(remote).write(LOCK_FILE, json.dumps(owner).encode())
    monkeypatch.setattr(following, "WriterWatch", functools.partial(WriterWatch, patience=1.0))
    argv = [*arguments(Path("none"), tmp_path / "run", data_dir, *RUN, "--follow")[1:], f"--store={remote}"]
    code, line = fail(argv, capsys, main=main)
    assert code == 75
    assert "saved at step 3" in line


class Real:
    """A precompute and a follower, each a process of its own.

    Args:
      asked: the store.
      workdir: of the follower.
    """

    EPOCHS = 1000

    def __init__(self, asked: Asked, workdir: Path) -> None:
        self.store, self.workdir = asked.store, workdir
        flags = asked.flags(f"--epochs={self.EPOCHS}", "--views_per_shard=170")
        self._precompute = [sys.executable, "-m", "pipeline.precompute", *flags]
        self.argv = [
            *arguments(asked.store, workdir, asked.data_dir, f"--epochs={self.EPOCHS}", "--batch_size=20"),
            "--deterministic",
            "--eval_split=test",
            "--eval_every=300",
        ]

    def precompute(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self._precompute, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def follow(self) -> subprocess.Popen[bytes]:
        done = command([*self.argv, "--follow"])
        return subprocess.Popen(
            done, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )

    def epochs(self) -> int:
        try:
            return StoreReader(self.store).epochs
        except UserError:
            return 0

    def grow(self, writer: subprocess.Popen[bytes]) -> int:
        """Lets a stopped precompute publish more, and stops it again; returns the number of epochs."""
        before, deadline = self.epochs(), time.monotonic() + 200
        writer.send_signal(signal.SIGCONT)
        while self.epochs() == before:
            assert writer.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        writer.send_signal(signal.SIGSTOP)
        return self.epochs()

    def wait_until_it_waits(self) -> None:
        wait_for_checkpoint(self.workdir, self.epochs() * N // 20)


@pytest.mark.slow
@pytest.mark.usefixtures("beam")
def test_killed_precompute_and_killed_follower_continue(
    tmp_path: Path, data_dir: Path, teacher_path: Path
) -> None:
    """The precompute is paused several times, so that the follower has to wait."""
    real = Real(Asked(data_dir, teacher_path, tmp_path / "store"), tmp_path / "run")
    with real.precompute() as writer:
        real.grow(writer)
        with real.follow() as reader:
            real.wait_until_it_waits()
            real.grow(writer)
            real.wait_until_it_waits()
            writer.kill()
            writer.wait()
            _, err = reader.communicate(timeout=200)
            assert reader.returncode == 75, err
            assert b"--follow" in err
    with real.precompute() as writer:
        assert real.grow(writer) < real.EPOCHS
        with real.follow() as reader:
            time.sleep(15)  # between its start and its first wait
            reader.kill()
        with real.follow() as reader:
            real.wait_until_it_waits()
            # The checkpoint may be that of the killed run. Before it has the lock, a signal ends a process at once.
            while not is_locked(real.workdir):
                time.sleep(0.05)
            time.sleep(10)
            reader.terminate()
            _, err = reader.communicate(timeout=200)
            assert reader.returncode == 143, err
        with real.follow() as reader:
            real.grow(writer)
            writer.send_signal(signal.SIGCONT)
            _, err = reader.communicate(timeout=500)
            assert reader.returncode == 0, err
        assert writer.wait(timeout=200) == 0
    finished = tmp_path / "finished"
    run_process([*real.argv, f"--workdir={finished}"])
    for name in ("checkpoints", "checkpoints/best"):
        ours, theirs = (checkpoint_weights(workdir, name) for workdir in (real.workdir, finished))
        assert_same_weights(list(ours.values()), [theirs[key] for key in ours])
    assert metrics(real.workdir, "eval_test") == metrics(finished, "eval_test")
