"""trainer.launch: whole lives of a job, with a recording program in front of gcloud; processes on the `TPU VM` are real."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from pipeline.errors import EXIT_TERMINATED, EXIT_USER_ERROR
from tests.fake_cloud import Cloud
from tests.launches import DATA, HOST_SCRIPT, PLACE, RUN, STOP, STORE, ended, launch


def let_go(cloud: Cloud) -> None:
    """The trainer goes past step 5."""
    (cloud.root / "go").touch()


def test_job_is_created_trained_and_deleted(cloud: Cloud, capsys: pytest.CaptureFixture[str]):
    let_go(cloud)
    code, out, _ = ended(launch("--spot", "--delete"), capsys)
    assert code == 0
    assert (
        out.index("from step 0") < out.index("step 10") < out.index("exit code 0") < out.index("is deleted")
    )
    assert cloud.verbs() == [
        *("tpu-vm describe", "tpu-vm create", "tpu-vm describe", "tpu-vm scp"),
        *("tpu-vm ssh pull", "tpu-vm ssh start", "tpu-vm ssh follow"),
        *("queued-resources describe", "tpu-vm describe", "tpu-vm delete"),
    ]
    assert cloud.read("node.json") is None
    saved = cloud.bucket(RUN)
    assert (saved / "step").read_text() == "10\n"
    assert (saved / "host.log").read_text().splitlines()[-1] == "finished"
    container = json.loads((cloud.root / "docker.jsonl").read_text().splitlines()[-1])
    assert {"--privileged", "--net=host", "--rm"} <= set(container)
    assert container[container.index("python") :] == [
        *("python", "-m", "trainer.train", "--store=inputs/store", "--data_dir=inputs/data_dir"),
        *("--workdir=work", "--strategy=tpu", "--tpu=local", "--batch_size=8"),
    ]


def test_a_streamed_store_is_not_copied(cloud: Cloud, capsys: pytest.CaptureFixture[str]):
    code, out, _ = ended(["launch", "--dry_run", "--stream_store", *launch()[1:]], capsys)
    assert code == 0
    assert f"-- --store={STORE} --data_dir=inputs/data_dir" in out
    assert f"data_dir={DATA} --" in out
    assert f" store={STORE}" not in out


@pytest.mark.parametrize("queued", [False, True], ids=["node", "queued resource"])
def test_preempted_job_is_created_again_and_resumed(
    queued: bool, cloud: Cloud, capsys: pytest.CaptureFixture[str]
):
    extra = ("--queued",) if queued else ()
    cloud.expect(
        {"match": "follow 1", "line": "step 5", "saved": f"{RUN}/ckpt-5.index", "then": "preempt"},
        {
            "match": "tpu-vm create",
            "after": 1,
            "code": 1,
            "stderr": "ERROR: There is no more capacity in the zone",
        },
        {
            "match": "sh pull",
            "after": 1,
            "code": 255,
            "stderr": "ssh: Connection refused",
        },  # the next is slow to boot
    )
    code, out, _ = ended(launch("--spot", "--delete", *extra), capsys)
    assert code == 0
    assert out.index("from step 0") < out.index("deleting what is left") < out.index("from step 5")
    assert "step 10" in out
    made = "queued-resources create" if queued else "tpu-vm create"
    assert cloud.verbs().count(made) == (2 if queued else 3)
    assert "us-central1-a has no more capacity; nothing costs meanwhile" in out or queued
    assert cloud.verbs().count("tpu-vm ssh pull") == 3
    assert cloud.read("node.json") is None
    assert cloud.read("queue.json") is None
    assert "in the queue: WAITING_FOR_RESOURCES" in out or not queued
    lines = [
        json.loads(line)["step"] for line in (cloud.bucket(RUN) / "metrics.jsonl").read_text().splitlines()
    ]
    assert lines == list(range(1, 11))


def test_dropped_connection_is_made_again_and_no_line_shown_twice(
    cloud: Cloud, capsys: pytest.CaptureFixture[str]
):
    cloud.expect({"match": "follow 1", "line": "step 5", "then": "drop"})
    code, out, _ = ended(launch(), capsys)
    assert code == 0
    assert [line for line in out.splitlines() if line.startswith("step")] == [
        f"step {i}" for i in range(1, 11)
    ]
    assert "connection lost; connecting again" in out
    assert cloud.verbs().count("tpu-vm ssh start") == 1
    assert out.splitlines()[-1] == f"flowers is still there and costs; delete it: {STOP}"


def test_detached_job_is_found_again_asked_after_and_stopped(
    cloud: Cloud, capsys: pytest.CaptureFixture[str]
):
    code, out, _ = ended(launch("--detach"), capsys)
    assert (code, out.splitlines()[-1]) == (
        0,
        f"flowers is there and costs, the trainer goes on there; delete it: {STOP}",
    )
    code, out, _ = ended(launch("--detach"), capsys)
    assert (code, cloud.verbs().count("tpu-vm create")) == (0, 1)
    assert "the trainer was running already" in out

    code, _, told = ended(launch(trainer=("--seed=7",)), capsys)
    assert code == EXIT_USER_ERROR
    assert "another job runs there: gs://bucket/runs/one 1 store=" in told

    code, out, _ = ended(["status", *PLACE], capsys)
    assert code == 0
    assert "node: READY, v3-8, HEALTHY\ntrainer: running\n" in out
    assert f"it costs until it is deleted: {STOP}" in out

    code, out, _ = ended(["stop", *PLACE], capsys)
    assert code == 0
    assert f"trainer: exit {EXIT_TERMINATED} stopped; flowers is there and costs; delete it: {STOP}" in out
    code, out, _ = ended(["logs", *PLACE, "--lines=1"], capsys)
    assert (code, out) == (0, "saved\n")
    assert (cloud.bucket(RUN) / "host.log").read_text().endswith("saved\n")

    let_go(cloud)
    code, out, _ = ended(launch("--delete"), capsys)  # the same command: it continues where it was stopped
    assert code == 0
    assert "from step 0" not in out
    assert "step 10" in out
    code, out, _ = ended(["status", *PLACE], capsys)
    assert (code, out) == (0, "node: there is none, and nothing costs\n")
    assert ended(["stop", *PLACE, "--delete"], capsys)[:2] == (
        0,
        "there is nothing to delete, and nothing costs\n",
    )


def test_trainer_that_is_terminated_with_its_machine_left_is_started_again(
    cloud: Cloud, capsys: pytest.CaptureFixture[str]
):
    # As by a host's maintenance: nobody has said stop.
    cloud.expect({"match": "follow 1", "line": "step 5", "then": "terminate"})
    code, out, _ = ended(launch(), capsys)
    assert code == 0
    assert "the trainer was terminated and has saved" in out
    assert cloud.verbs().count("tpu-vm ssh start") == 2
    assert "step 10" in out


def test_trainers_own_error_is_this_commands(cloud: Cloud, capsys: pytest.CaptureFixture[str]):
    code, out, _ = ended(launch("--delete", trainer=("--seed=13",)), capsys)
    assert code == 3
    assert "error: unlucky" in out
    assert "flowers is deleted" in out


def test_trainer_that_is_killed_is_reported_with_its_exit_code(
    cloud: Cloud, capsys: pytest.CaptureFixture[str]
):
    code, out, _ = ended(launch("--delete", trainer=("--seed=9",)), capsys)
    assert code == 137
    assert "killed by SIGKILL" in out
    assert "memory" in out


def test_bucket_that_does_not_answer_is_not_taken_for_a_new_run(
    cloud: Cloud, capsys: pytest.CaptureFixture[str]
):
    cloud.expect({"match": f"storage ls {RUN}/", "code": 1, "stderr": "ERROR: 503 try later"})
    code, out, _ = ended(launch(), capsys)
    assert code == 74
    assert "ERROR: 503 try later" in out
    assert "from step" not in out
    assert not cloud.bucket(RUN).exists()


def test_what_names_a_checkpoint_is_copied_after_it(cloud: Cloud):
    """A machine that goes between the two copies leaves a bucket in which every file that is named is whole."""
    home = cloud.root / "vm"
    for name in ("work/checkpoints/ckpt-5.index", "work/checkpoints/checkpoint", "log"):
        path = home / "view-distill" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    cloud.expect({"match": "storage rsync snapshot", "after": 1, "code": 1, "stderr": "ERROR: gone"})
    env = {**os.environ, "HOME": str(home)}
    done = subprocess.run(["bash", HOST_SCRIPT, "save", RUN], env=env, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert (cloud.bucket(RUN) / "checkpoints" / "ckpt-5.index").exists()
    assert not (cloud.bucket(RUN) / "checkpoints" / "checkpoint").exists()
    subprocess.run(["bash", HOST_SCRIPT, "save", RUN], env=env, check=True)
    assert (cloud.bucket(RUN) / "checkpoints" / "checkpoint").exists()


@pytest.mark.slow
def test_work_that_could_not_be_saved_is_saved_by_the_next_start(
    cloud: Cloud, capsys: pytest.CaptureFixture[str]
):
    let_go(cloud)
    refused = {"match": "snapshot gs://", "code": 1, "stderr": "ERROR: 503 try later"}
    cloud.expect(*[refused] * 20)
    code, out, _ = ended(launch("--save_seconds=600"), capsys)
    assert code == 74
    assert "kept on this machine, and copied at the next start" in out
    cloud.expect()
    code, out, _ = ended(launch("--save_seconds=600"), capsys)
    assert (code, (cloud.bucket(RUN) / "step").read_text()) == (0, "10\n")
    assert "from step 10" in out
