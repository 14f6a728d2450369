"""trainer.distribution.workers: two processes on loopback, which are killed, terminated and restarted."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from pipeline.errors import EXIT_TERMINATED, EXIT_TRY_AGAIN, EXIT_USER_ERROR, UserError
from pipeline.storage.files import write_text
from pipeline.storage.lock import writer_lock
from pipeline.store.metadata import INFO_FILE
from tests.replica_runs import RUNS
from tests.runs import ROOT, checkpoint_weights, environment, losses, metrics
from trainer import train
from trainer.config.choices import TF_CONFIG_EXAMPLE
from trainer.distribution.workers import WorkerLostError, Workers, find_lost_worker, read_tf_config

BATCH, STEPS = 2, 24
# Synchronized batch normalization has the most potential collectives.
COMMAND = "import tests.replica_runs; from pipeline.cli.main import run_command; run_command(tests.replica_runs.train.main)"
FLAGS = [
    *(
        *RUNS["sync_batch_norm"],
        f"--batch_size={BATCH}",
        f"--steps={STEPS}",
        "--warmup_steps=1",
        "--deterministic",
    ),
    *("--log_every=1", "--eval_every=6", "--checkpoint_every=2", "--learning_rate=0.01"),
]


@dataclasses.dataclass
class Ended:
    """Exit codes and outputs by rank."""

    codes: list[int]
    out: list[str]
    err: list[str]

    def lines(self, rank: int) -> list[str]:
        """Error lines on standard error, without TensorFlow's notices and the progress bar."""
        assert "Traceback" not in self.err[rank], self.err[rank]
        return [line for line in self.err[rank].splitlines() if line.startswith(("error: ", "SIGTERM: "))]


class Pair:
    """Two workers of one run."""

    def __init__(self, argv: list[str], *, more: list[str] | None = None) -> None:
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            two.bind(("127.0.0.1", 0))
            hosts = [f"127.0.0.1:{free.getsockname()[1]}" for free in (one, two)]
        self.processes = []
        for rank in range(2):
            config = {"cluster": {"worker": hosts}, "task": {"type": "worker", "index": rank}}
            self.processes.append(
                subprocess.Popen(
                    [
                        sys.executable,
                        "-c",
                        COMMAND,
                        *argv,
                        "--strategy=multiworker",
                        *((more or []) if rank else []),
                    ],
                    cwd=ROOT,
                    env=environment() | {"TF_CONFIG": json.dumps(config)},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )

    def signal_after(self, step: int, workdir: Path, rank: int, number: signal.Signals) -> None:
        """Sends a worker a signal once `step` is in metrics.jsonl."""
        path = workdir / "metrics.jsonl"
        while not (path.exists() and any(line["step"] >= step for line in metrics(workdir, "train"))):
            assert all(process.poll() is None for process in self.processes), self.end().err
            time.sleep(0.01)
        self.processes[rank].send_signal(number)

    def end(self) -> Ended:
        """Waits for both."""
        texts = [process.communicate(timeout=300) for process in self.processes]
        return Ended([process.returncode for process in self.processes], *map(list, zip(*texts, strict=True)))


@pytest.fixture(scope="module")
def argv_of(published_store: Path, data_dir: Path) -> list[str]:
    """Flags of the command, without --workdir."""
    return [f"--store={published_store}", f"--data_dir={data_dir}", *FLAGS]


@pytest.mark.slow
def test_two_workers_follow_a_growing_store(
    undisturbed: tuple[Path, Ended], argv_of: list[str], published_store: Path, tmp_path: Path
):
    """They wait, continue and end together."""
    store, workdir = Path(shutil.copytree(published_store, tmp_path / "store")), tmp_path / "run"
    whole = (store / INFO_FILE).read_text()
    info = json.loads(whole)
    info["splits"][0]["shardLengths"] = ["20"]  # an epoch and three views: 8 steps
    (store / INFO_FILE).write_text(json.dumps(info))
    argv = [*argv_of[1:], f"--store={store}", f"--workdir={workdir}", "--follow"]
    ended = Pair(argv).end()
    assert ended.codes == [EXIT_TRY_AGAIN, EXIT_TRY_AGAIN], ended.err
    with writer_lock(store):
        pair = Pair(argv)
        time.sleep(40)  # until they wait
        assert [process.poll() for process in pair.processes] == [None, None]
        write_text(store / INFO_FILE, whole)
        ended = pair.end()
    assert ended.codes == [0, 0], ended.err
    assert losses(workdir) == losses(undisturbed[0])
    assert metrics(workdir, "eval_test") == metrics(undisturbed[0], "eval_test")


@pytest.fixture(scope="module")
def undisturbed(argv_of: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """An undisturbed run of two workers."""
    workdir = tmp_path_factory.mktemp("workers") / "undisturbed"
    return workdir, Pair([*argv_of, f"--workdir={workdir}"]).end()


@pytest.mark.slow
def test_two_workers_train_as_one_process_on_the_same_views_and_the_chief_alone_writes(
    undisturbed: tuple[Path, Ended], argv_of: list[str], tmp_path: Path
):
    workdir, ended = undisturbed
    assert ended.codes == [0, 0], ended.err
    assert train.main([*argv_of, f"--workdir={tmp_path}"]) == 0
    # Only the order of float32 sums differs.
    np.testing.assert_allclose([*losses(workdir).values()], [*losses(tmp_path).values()], rtol=1e-4)
    assert [line["step"] for line in metrics(workdir, "eval_test")] == [6, 12, 18, 24]
    assert {path.name for path in workdir.iterdir()} == {path.name for path in tmp_path.iterdir()}
    assert len([*(workdir / "tensorboard").iterdir()]) == 1
    assert "views/s" in ended.err[0]
    assert "views/s" not in ended.err[1]
    assert "student: " in ended.out[0]


@pytest.mark.slow
def test_killed_and_terminated_workers_continue_and_equal_an_undisturbed_run(
    undisturbed: tuple[Path, Ended], argv_of: list[str], tmp_path: Path
):
    workdir = tmp_path / "run"
    argv = [*argv_of, f"--workdir={workdir}"]
    # The worker is killed; the chief notices after 10 s without a heartbeat.
    pair = Pair(argv)
    pair.signal_after(3, workdir, 1, signal.SIGKILL)
    ended = pair.end()
    assert ended.codes == [EXIT_TRY_AGAIN, -signal.SIGKILL], ended.err
    (line,) = ended.lines(0)
    assert "worker 1" in line
    # The chief is killed.
    pair = Pair(argv)
    pair.signal_after(8, workdir, 0, signal.SIGKILL)
    ended = pair.end()
    assert ended.codes == [-signal.SIGKILL, EXIT_TRY_AGAIN], ended.err
    (line,) = ended.lines(1)
    assert "worker 0" in line
    # One of them is terminated: both save as of the same step.
    pair = Pair(argv)
    pair.signal_after(14, workdir, 1, signal.SIGTERM)
    ended = pair.end()
    assert ended.codes == [EXIT_TERMINATED, EXIT_TERMINATED], ended.err
    assert "continuing at step" in ended.out[0]
    ((chief,), (other,)) = (ended.lines(rank)[-1:] for rank in range(2))
    assert chief == other
    assert chief.startswith("SIGTERM: saved at step ")
    # The last part.
    ended = Pair(argv).end()
    assert ended.codes == [0, 0], ended.err
    assert f"continuing at step {chief.split('step ')[1].split(';')[0]} of {STEPS}" in ended.out[1]
    assert losses(workdir) == losses(undisturbed[0])
    ours, theirs = (checkpoint_weights(directory) for directory in (workdir, undisturbed[0]))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--log_every=3", "--warmup_steps=5", "--follow", "--student=small"])
def test_workers_with_other_flags_are_refused_by_all(argv_of: list[str], tmp_path: Path, flag: str):
    ended = Pair([*argv_of, f"--workdir={tmp_path}"], more=[flag]).end()
    assert ended.codes == [EXIT_USER_ERROR, EXIT_USER_ERROR], ended.err
    lines = [ended.lines(rank) for rank in range(2)]
    assert lines[0] == lines[1]
    assert flag.removeprefix("--").split("=")[0] in lines[0][0]


@pytest.mark.slow
def test_address_in_use_is_reported(argv_of: list[str], tmp_path: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        config = {"cluster": {"worker": [address]}, "task": {"type": "worker", "index": 0}}
        done = subprocess.run(
            [sys.executable, "-c", COMMAND, *argv_of, f"--workdir={tmp_path}", "--strategy=multiworker"],
            cwd=ROOT,
            env=environment() | {"TF_CONFIG": json.dumps(config)},
            capture_output=True,
            text=True,
        )
    assert done.returncode == EXIT_USER_ERROR, done.stderr
    assert "Traceback" not in done.stderr
    assert "--strategy=multiworker: " in done.stderr
    assert address in done.stderr


def config_text(task: object = None, **cluster: object) -> str:
    return json.dumps({"cluster": cluster, "task": task or {"type": "worker", "index": 0}})


def test_tf_config_is_parsed(monkeypatch: pytest.MonkeyPatch):
    text = config_text({"type": "worker", "index": "1"}, chief=["[::1]:1"], worker=["host:2", "10.0.0.3:3"])
    monkeypatch.setenv("TF_CONFIG", text)
    assert read_tf_config() == {
        "cluster": {"chief": ["[::1]:1"], "worker": ["host:2", "10.0.0.3:3"]},
        "task": {"type": "worker", "index": 1},
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "TF_CONFIG is not set"),
        ("", "TF_CONFIG is not set"),
        ("{", "TF_CONFIG={: Expecting property name"),
        ("[]", "list indices must be integers"),
        ("{}", "no 'cluster'"),
        (json.dumps({"cluster": {"worker": ["a:1"]}}), "no 'task'"),
        (
            json.dumps({"cluster": ["a:1"], "task": {"type": "worker", "index": 0}}),
            "has no attribute 'items'",
        ),
        (
            config_text(worker=["a:1"], ps=["b:1"]),
            "'ps'",
        ),
        (config_text(chief=["a:1", "b:1"], worker=["c:1"]), "one chief"),
        (config_text({"type": "worker", "index": 2}, worker=["a:1", "b:1"]), "the cluster has no worker 2"),
        (config_text({"type": "worker", "index": -1}, worker=["a:1"]), "the cluster has no worker -1"),
        (config_text({"type": "chief", "index": 0}, worker=["a:1"]), "the cluster has no chief 0"),
        (config_text({"type": "worker", "index": "one"}, worker=["a:1"]), "invalid literal for int"),
        (config_text(worker=["a"]), "'a' is not host:port"),
        (config_text(worker=[1]), "1 is not host:port"),
    ],
)
def test_wrong_tf_config_is_one_line_with_an_example(
    text: str | None, message: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    if text is not None:
        monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(UserError) as error_info:
        read_tf_config()
    assert message in str(error_info.value)
    assert "--strategy=multiworker" in str(error_info.value)
    assert TF_CONFIG_EXAMPLE in str(error_info.value)
    assert "\n" not in str(error_info.value)


def test_single_process_is_the_chief():
    workers = Workers(tf.distribute.get_strategy())
    assert (workers.count, workers.rank, workers.chief) == (1, 0, True)
    assert workers.gather(7).tolist() == [7]
    workers.check_same({"step": 3, "flags": {"seed": 0}}, remedy="none")
    workers.wait()
    with pytest.raises(tf.errors.UnavailableError), workers.watch():  # there is no other worker
        raise tf.errors.UnavailableError(None, None, "Collective ops is aborted by: Socket closed")


# Messages of TensorFlow 2.15.
HEARTBEAT = (
    "Graph execution error:\n\nDetected at node CollectiveReduceV2\nCollective ops is aborted by: Error reported from "
    "/job:worker/task:1: Task /job:worker/replica:0/task:1 heartbeat timeout. This indicates that the remote task has failed"
)
CLOSED = (
    "Collective ops is aborted by: Socket closed\nAdditional GRPC error information from remote target "
    "/job:chief/replica:0/task:0 while calling /tensorflow.WorkerService/RecvBuf:"
)


@pytest.mark.parametrize(
    ("text", "who"),
    [
        (HEARTBEAT, "worker 1"),
        (CLOSED, "chief 0"),
        ("Collective ops is aborted by: something", "another worker"),
    ],
)
def test_lost_worker_is_named(text: str, who: str):
    found = find_lost_worker(tf.errors.UnavailableError(None, None, text))
    assert isinstance(found, WorkerLostError)
    assert who in str(found)
    assert found.exit_code == EXIT_TRY_AGAIN


@pytest.mark.parametrize(
    "error",
    [
        tf.errors.InternalError(
            None, None, "Collective ops is aborted by: Collective instance 200 expected type 1"
        ),
        tf.errors.UnavailableError(None, None, "a file system is away"),
        RuntimeError("Collective ops is aborted"),
    ],
)
def test_other_errors_are_not_taken_for_a_lost_worker(error: Exception):
    assert find_lost_worker(error) is None
