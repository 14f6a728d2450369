"""trainer.launch: jobs from start to end, with a simulated gcloud; processes on the `TPU VM` are real."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from pipeline.errors import EXIT_TERMINATED, EXIT_USER_ERROR
from tests.fake_cloud import Cloud
from tests.launches import DATA, HOST_SCRIPT, PLACE, RUN, STOP, STORE, ended, launch


def release(cloud: Cloud) -> None:
    """Lets the trainer pass step 5."""
    (cloud.root / "go").touch()


def test_job_is_created_trained_and_deleted(cloud: Cloud, capsys: pytest.CaptureFixture[str]):
    release(cloud)
    code, out, _ = ended(launch("--spot", "--delete"), capsys)
    assert code == 0
    assert out.index("from step 0") < out.index("step 10") < out.index("exit code 0")
    assert cloud.verbs() == [
        *("tpu-vm list", "tpu-vm create", "tpu-vm list", "tpu-vm scp"),
        *("tpu-vm ssh pull", "tpu-vm ssh start", "tpu-vm ssh follow"),
        *("queued-resources list", "tpu-vm list", "tpu-vm delete"),
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


def test_streamed_store_is_not_copied(cloud: Cloud, capsys: pytest.CaptureFixture[str]):
    code, out, _ = ended(["launch", "--dry_run", "--stream_store", *launch()[1:]], capsys)
    assert code == 0
    assert f"-- --store={STORE} --data_dir=inputs/data_dir" in out
    assert f"data_dir={DATA} --" in out
    assert f" store={STORE}" not in out


SECOND = "gs://bucket/second"


def test_several_stores_and_their_teachers_are_copied(
    cloud: Cloud, float32_store: Path, capsys: pytest.CaptureFixture[str]
):
    release(cloud)
    shutil.copytree(float32_store, cloud.bucket(SECOND))
    cloud.bucket("gs://bucket/teacher").mkdir()
    (cloud.bucket("gs://bucket/teacher") / "saved_model.pb").touch()
    cloud.bucket("gs://bucket/big.keras").touch()
    teachers = ("--teacher=gs://bucket/teacher/", "--teacher=gs://bucket/big.keras")
    extra = (f"--store={STORE}", f"--store={SECOND}/", *teachers, "--delete")
    code, out, message = ended(launch(*extra, trainer=("--store_weights=3,1", "--epochs=9")), capsys)
    assert code == 0, message
    assert "0.75" in out  # described from the metadata of both stores
    container = json.loads((cloud.root / "docker.jsonl").read_text().splitlines()[-1])
    assert container[container.index("trainer.train") + 1 :] == [
        *("--store=inputs/store", "--store=inputs/store_2", "--data_dir=inputs/data_dir"),
        *("--teacher=inputs/teacher", "--teacher=inputs/teacher_2/big.keras"),
        *("--workdir=work", "--strategy=tpu", "--tpu=local", "--batch_size=8"),
        *("--store_weights=3,1", "--epochs=9"),
    ]


def test_streamed_stores_are_not_copied_and_others_are(cloud: Cloud, capsys: pytest.CaptureFixture[str]):
    stores = (f"--store={STORE}", f"--store={SECOND}", "--store=/mnt/disks/third")
    code, out, _ = ended(["launch", "--dry_run", "--stream_store", *launch(*stores)[1:]], capsys)
    assert code == 0
    assert f"-- --store={STORE} --store={SECOND} --store=/mnt/disks/third --data_dir=inputs/data_dir" in out
    assert f"1 data_dir={DATA} --" in out
    assert "storage rsync" not in out  # all of them together cannot be checked from here


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
        },  # the next machine boots slowly
    )
    code, out, _ = ended(launch("--spot", "--delete", *extra), capsys)
    assert code == 0
    assert out.index("from step 0") < out.index("from step 5")
    assert "step 10" in out
    made = "queued-resources create" if queued else "tpu-vm create"
    assert cloud.verbs().count(made) == (2 if queued else 3)
    assert cloud.verbs().count("tpu-vm ssh pull") == 3
    assert cloud.read("node.json") is None
    assert cloud.read("queue.json") is None
    assert "WAITING_FOR_RESOURCES" in out or not queued
    lines = [
        json.loads(line)["step"] for line in (cloud.bucket(RUN) / "metrics.jsonl").read_text().splitlines()
    ]
    assert lines == list(range(1, 11))


def test_dropped_connection_is_restored_and_no_line_is_printed_twice(
    cloud: Cloud, capsys: pytest.CaptureFixture[str]
):
    cloud.expect({"match": "follow 1", "line": "step 5", "then": "drop"})
    code, out, _ = ended(launch(), capsys)
    assert code == 0
    assert [line for line in out.splitlines() if line.startswith("step")] == [
        f"step {i}" for i in range(1, 11)
    ]
    assert cloud.verbs().count("tpu-vm ssh start") == 1
    assert STOP in out.splitlines()[-1]


def test_short_outage_of_the_service_does_not_end_the_launch(
    cloud: Cloud, capsys: pytest.CaptureFixture[str]
):
    unavailable = {"code": 1, "stderr": "ERROR: gcloud crashed: HTTPError 503: Unavailable"}
    cloud.expect(
        {"match": "follow 1", "line": "step 5", "then": "drop"},
        {"match": "tpu-vm list", **unavailable},  # before the node exists
        {"match": "tpu-vm list", "after": 2, **unavailable},  # after the connection was lost
        {"match": "tpu-vm delete", **unavailable},  # at the end
    )
    code, out, _ = ended(launch("--delete"), capsys)
    assert code == 0
    assert "step 10" in out
    assert cloud.read("node.json") is None


@pytest.mark.parametrize(
    "trainer",
    [
        ("--student=keras:MobileNetV3Small", "--image_size=32"),
        ("--student=my_image.models:build",),
        ("--student=/mnt/disks/student.keras", "--init=/mnt/disks/weights.h5"),
    ],
)
def test_student_of_the_image_or_the_vm_is_passed_on(
    trainer: tuple[str, ...], cloud: Cloud, capsys: pytest.CaptureFixture[str]
):
    code, _, message = ended(launch("--detach", trainer=trainer), capsys)
    assert code == 0, message
    assert cloud.verbs().count("tpu-vm ssh start") == 1


@pytest.mark.parametrize("extra", [("--stream_store",), ("--store=/mnt/disks/store",)])
def test_growing_store_can_be_followed_at_its_own_place(
    extra: tuple[str, ...], cloud: Cloud, capsys: pytest.CaptureFixture[str]
):
    argv = launch(*extra, trainer=("--follow", "--epochs=3"))
    code, out, message = ended(["launch", "--dry_run", *argv[1:]], capsys)
    assert code == 0, message
    assert "--follow" in out


def test_detached_job_is_found_again_shown_and_stopped(cloud: Cloud, capsys: pytest.CaptureFixture[str]):
    code, out, _ = ended(launch("--detach"), capsys)
    assert code == 0
    assert STOP in out.splitlines()[-1]
    code, out, _ = ended(launch("--detach"), capsys)
    assert (code, cloud.verbs().count("tpu-vm create")) == (0, 1)

    code, _, message = ended(launch(trainer=("--seed=7",)), capsys)
    assert code == EXIT_USER_ERROR
    assert f"{RUN} 1 store=" in message

    code, out, _ = ended(["status", *PLACE], capsys)
    assert code == 0
    assert "node: READY, v3-8, HEALTHY\ntrainer: running\n" in out
    assert STOP in out

    code, out, _ = ended(["stop", *PLACE], capsys)
    assert code == 0
    assert f"trainer: exit {EXIT_TERMINATED} stopped" in out
    assert STOP in out
    code, out, _ = ended(["logs", *PLACE, "--lines=1"], capsys)
    assert (code, out) == (0, "saved\n")
    assert (cloud.bucket(RUN) / "host.log").read_text().endswith("saved\n")

    release(cloud)
    code, out, _ = ended(launch("--delete"), capsys)  # the same command: it continues where it was stopped
    assert code == 0
    assert "from step 0" not in out
    assert "step 10" in out
    code, out, _ = ended(["status", *PLACE], capsys)
    assert code == 0
    assert "READY" not in out
    assert ended(["stop", *PLACE, "--delete"], capsys)[0] == 0
    assert "tpu-vm delete" not in cloud.verbs()[-2:]


def test_trainer_terminated_on_a_machine_that_stays_is_restarted(
    cloud: Cloud, capsys: pytest.CaptureFixture[str]
):
    # For example by maintenance of the host, without `stop`.
    cloud.expect({"match": "follow 1", "line": "step 5", "then": "terminate"})
    code, out, _ = ended(launch(), capsys)
    assert code == 0
    assert cloud.verbs().count("tpu-vm ssh start") == 2
    assert "step 10" in out


def test_exit_code_and_error_are_the_trainers_own(cloud: Cloud, capsys: pytest.CaptureFixture[str]):
    code, out, _ = ended(launch("--delete", trainer=("--seed=13",)), capsys)
    assert code == 3
    assert "error: unlucky" in out
    assert cloud.read("node.json") is None


def test_killed_trainer_is_reported_with_its_exit_code(cloud: Cloud, capsys: pytest.CaptureFixture[str]):
    code, out, _ = ended(launch("--delete", trainer=("--seed=9",)), capsys)
    assert code == 137
    assert "SIGKILL" in out


def test_unreachable_bucket_is_not_taken_for_a_new_run(cloud: Cloud, capsys: pytest.CaptureFixture[str]):
    cloud.expect({"match": f"objects list {RUN}/", "code": 1, "stderr": "ERROR: 503 try later"})
    code, out, _ = ended(launch(), capsys)
    assert code == 74
    assert "ERROR: 503 try later" in out
    assert "from step" not in out
    assert not cloud.bucket(RUN).exists()


def test_checkpoint_state_is_copied_after_its_checkpoint(cloud: Cloud):
    """If the machine disappears between the two copies, every checkpoint named in the bucket is complete."""
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
def test_unsaved_work_is_saved_by_the_next_start(cloud: Cloud, capsys: pytest.CaptureFixture[str]):
    release(cloud)
    refused = {"match": "snapshot gs://", "code": 1, "stderr": "ERROR: 503 try later"}
    cloud.expect(*[refused] * 20)
    code, out, _ = ended(launch("--save_seconds=600"), capsys)
    assert code == 74
    cloud.expect()
    code, out, _ = ended(launch("--save_seconds=600"), capsys)
    assert (code, (cloud.bucket(RUN) / "step").read_text()) == (0, "10\n")
    assert "from step 10" in out
