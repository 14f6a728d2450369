"""trainer.launch: refusals by gcloud, by the host, and before anything is billed; what Ctrl-C leaves behind."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import EXIT_DATA_ERROR, EXIT_INTERRUPTED, EXIT_TRY_AGAIN, EXIT_USER_ERROR
from tests.fake_cloud import Cloud
from tests.launches import PLACE, RUN, STOP, STORE, ended, launch

QUOTA = (
    "ERROR: (gcloud.compute.tpus.tpu-vm.create) RESOURCE_EXHAUSTED: Quota limit 'TPUV3' has been exceeded."
)


@pytest.mark.parametrize(
    ("event", "extra", "code", "expected"),
    [
        ({"match": "tpu-vm create", "code": 1, "stderr": QUOTA}, (), 2, "Quota limit 'TPUV3'"),
        (
            {"match": "tpu-vm create", "code": 1, "stderr": "ERROR: There is no more capacity in the zone"},
            ("--spot",),
            2,
            "--queued",
        ),
        (
            {"match": "tpu-vm create", "code": 1, "stderr": "ERROR: ALREADY_EXISTS: x"},
            (),
            2,
            "ALREADY_EXISTS: x",
        ),
        (
            {"match": "queued-resources create", "code": 1, "stderr": "ERROR: ALREADY_EXISTS: x"},
            ("--queued",),
            2,
            "ALREADY_EXISTS: x",
        ),
        (
            {
                "match": "tpu-vm list",
                "code": 1,
                "stderr": "ERROR: no account.\nPlease run:\n  $ gcloud auth login",
            },
            (),
            2,
            "gcloud auth login",
        ),
        ({"match": "sh pull", "code": 1, "stderr": "denied: no such image"}, (), 2, "denied: no such image"),
    ],
    ids=["quota", "capacity", "name", "name in the queue", "login", "image"],
)
def test_refusals_are_one_line(
    event: dict,
    extra: tuple[str, ...],
    code: int,
    expected: str,
    cloud: Cloud,
    capsys: pytest.CaptureFixture[str],
):
    cloud.expect(event)
    got, _, message = ended(launch(*extra), capsys)
    assert got == code
    assert message.startswith("error: gcloud ")
    assert expected in message
    created = event["match"] == "sh pull"
    assert (STOP in message) == created


def test_failed_connections_are_reported_with_the_node(cloud: Cloud, capsys: pytest.CaptureFixture[str]):
    closed = {"match": "tpu-vm scp", "code": 255, "stderr": "ssh: connect to host 1.2.3.4 port 22: timed out"}
    cloud.expect(*[closed] * 5)
    code, _, message = ended(launch(), capsys)
    assert code == EXIT_TRY_AGAIN
    assert "port 22: timed out" in message
    assert "--internal_ip" in message
    assert STOP in message


def test_node_of_another_type_is_refused(cloud: Cloud, capsys: pytest.CaptureFixture[str]):
    cloud.create_node("v2-8")
    code, _, message = ended(launch(), capsys)
    assert code == EXIT_USER_ERROR
    assert message.startswith("error: --tpu=flowers: ")
    assert "v2-8" in message
    assert "v3-8" in message


def test_failed_queued_resource_is_reported_with_its_reason(cloud: Cloud, capsys: pytest.CaptureFixture[str]):
    data = {"failedData": {"error": {"message": "no v3 in this zone"}}}
    cloud.write("queue.json", {"states": ["FAILED"], "type": "v3-8", "data": data})
    code, _, message = ended(launch("--queued"), capsys)
    assert code == EXIT_USER_ERROR
    assert "no v3 in this zone" in message
    assert message.endswith(STOP)


def test_node_deleted_by_someone_else_is_not_created_again(cloud: Cloud, capsys: pytest.CaptureFixture[str]):
    cloud.expect({"match": "follow 1", "line": "step 5", "then": "delete"})
    code, _, message = ended(launch("--spot"), capsys)
    assert code == EXIT_TRY_AGAIN
    assert "flowers" in message
    assert cloud.verbs().count("tpu-vm create") == 1


@pytest.mark.parametrize(
    ("event", "billed"),
    [
        ({"match": "tpu-vm list", "interrupt": True}, False),
        ({"match": "tpu-vm create", "interrupt": True}, True),
        ({"match": "sh pull", "interrupt": True}, True),
        ({"match": "follow 1", "line": "step 5", "then": "interrupt"}, True),
    ],
    ids=["before", "creating", "setting up", "training"],
)
def test_ctrl_c_reports_a_node_that_is_billed(
    event: dict, billed: bool, cloud: Cloud, capsys: pytest.CaptureFixture[str]
):
    cloud.expect(event)
    code, _, message = ended(launch(), capsys)
    assert code == EXIT_INTERRUPTED
    assert (STOP in message) == billed


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (launch("--type=v3-32"), "--type=v3-32"),
        (launch("--spot", "--reserved"), "--spot and --reserved"),
        (launch("--wheel=x.whl"), "--image, --image_file and --wheel"),
        (launch("--workdir=/tmp/run"), "--workdir=/tmp/run"),
        (launch("--stream_store", "--store=/disk/store"), "--store=/disk/store"),
        (launch("--store=relative"), "--store=relative"),
        (launch(f"--store={STORE}", f"--store={STORE}/"), f"--store={STORE}"),
        (launch(f"--store={STORE}", "--store=gs://b/2", "--teacher=gs://b/t"), "--teacher=gs://b/t"),
        (launch(trainer=("--store_weights=1,2",)), "--store_weights="),
        (launch(f"--store={STORE}", "--store=gs://b/2", trainer=("--store_weights=1",)), "--store_weights=1"),
        (launch(f"--store={STORE}", "--store=/d/2", trainer=("--follow", "--epochs=3")), "--follow"),
        (launch("--type=tpu7x-8"), "--type=tpu7x-8"),
        (launch("--spott"), "--spot?"),
        (launch(trainer=("--recipee=bit",)), "--recipe?"),
        (launch(trainer=("--store=x",)), "--store=x"),
        (launch("--dry_run", trainer=("--student=nonsense",)), "--student=nonsense"),
        (launch("--dry_run", trainer=("--student=keras:VGG17",)), "did you mean keras:VGG1"),
        (launch("--dry_run", trainer=("--student=runs/student.keras",)), "--student=runs/student.keras"),
        (launch("--dry_run", trainer=("--init=BiT-M-R50x1.npz",)), "--init=BiT-M-R50x1.npz"),
        (launch("--dry_run", trainer=("--recipe=nonsense",)), "nonsense"),
        (launch(trainer=("--strategy=nonsense",)), "--strategy=nonsense"),
        (launch(trainer=("--strategy=multiworker",)), "--strategy=multiworker"),
        (launch(trainer=("--strategy=tpu",)), "--tpu=local"),
        (launch(trainer=("--strategy=tpu", "--tpu=other")), "--tpu=other"),
        (launch(trainer=("--replicas=2",)), "--replicas=2"),
        (launch(trainer=("--batch_size=12",)), "8 replicas"),
        (launch("--type=v4-8", trainer=("--batch_size=6",)), "4 replicas"),
        (launch(trainer=("--steps=10", "--epochs=2")), "--steps"),
        (launch(trainer=("--steps=10", "--warmup_steps=10")), "--warmup_steps=10"),
        (launch(trainer=("--epochs=inf",)), "--teacher"),
        (launch("--teacher=gs://bucket/teacher", trainer=("--write_back",)), "--write_back"),
        (
            launch("--teacher=gs://bucket/teacher", trainer=("--write_back", "--strategy=default")),
            "--write_back",
        ),
        (launch(trainer=("--follow", "--epochs=3")), "--follow"),
        (["stop", *PLACE, "--", "--seed=1"], "--seed=1"),
    ],
)
def test_mistakes_are_refused_without_a_command(
    argv: list[str], expected: str, cloud: Cloud, capsys: pytest.CaptureFixture[str]
):
    code, _, message = ended(argv, capsys)
    assert code == EXIT_USER_ERROR
    assert expected in message
    assert cloud.calls() == []


@pytest.mark.parametrize(
    ("argv", "code", "expected"),
    [
        (launch(trainer=("--epochs=99",)), EXIT_USER_ERROR, "51"),
        (launch(trainer=("--recipe=keras_example",)), EXIT_USER_ERROR, "--recipe=keras_example"),
        (launch(trainer=("--eval_split=nonsense",)), EXIT_USER_ERROR, "nonsense"),
        (launch("--stream_store", trainer=("--steps=99",)), EXIT_USER_ERROR, "51"),
        (launch("--store=gs://bucket/typo"), EXIT_USER_ERROR, "--store=gs://bucket/typo"),
        (
            launch(f"--store={STORE}", "--store=gs://bucket/typo"),
            EXIT_USER_ERROR,
            "--store=gs://bucket/typo",
        ),
        (launch(trainer=("--student=keras:InceptionV3",)), EXIT_USER_ERROR, "keras:InceptionV3"),
        (launch("--teacher=gs://bucket/teacher", trainer=("--steps=6",)), EXIT_USER_ERROR, "--teacher="),
        (launch("--data_dir=gs://bucket/typo"), EXIT_USER_ERROR, "--data_dir=gs://bucket/typo"),
        (launch("--teacher=gs://bucket/typo.keras"), EXIT_USER_ERROR, "--teacher=gs://bucket/typo.keras"),
    ],
)
def test_flags_that_do_not_fit_the_store_are_refused_before_a_node_exists(
    argv: list[str], code: int, expected: str, cloud: Cloud, capsys: pytest.CaptureFixture[str]
):
    cloud.bucket("gs://bucket/teacher").mkdir()
    (cloud.bucket("gs://bucket/teacher") / "saved_model.pb").touch()
    got, _, message = ended(argv, capsys)
    assert (got, message[:7]) == (code, "error: ")
    assert expected in message
    assert cloud.verbs() == []


def test_stores_of_different_views_are_refused_with_both_sides(
    cloud: Cloud, make_store: Callable[..., Path], capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(make_store("seeded", epochs=1, seed=3), cloud.bucket("gs://bucket/other"))
    code, _, message = ended(launch(f"--store={STORE}", "--store=gs://bucket/other"), capsys)
    assert code in (EXIT_USER_ERROR, EXIT_DATA_ERROR)
    for part in (STORE, "--store=gs://bucket/other", "seed: "):
        assert part in message
    assert cloud.verbs() == []


def test_teacher_of_a_continued_run_is_left_to_the_trainer(cloud: Cloud, capsys: pytest.CaptureFixture[str]):
    """It may have been needed before the store grew."""
    (cloud.root / "go").touch()
    cloud.bucket("gs://bucket/teacher.keras").touch()
    (cloud.bucket(RUN) / "checkpoints").mkdir(parents=True)
    (cloud.bucket(RUN) / "checkpoints" / "checkpoint").touch()
    code, _, message = ended(launch("--teacher=gs://bucket/teacher.keras", trainer=("--steps=6",)), capsys)
    assert code == 0, message


def test_damaged_store_is_refused_before_a_node_exists(cloud: Cloud, capsys: pytest.CaptureFixture[str]):
    (cloud.bucket(STORE) / "manifest.json").write_text("{")
    code, _, message = ended(launch(), capsys)
    assert code == EXIT_DATA_ERROR
    assert f"{STORE}/manifest.json" in message
    assert cloud.verbs() == []


def test_store_without_read_access_is_left_to_the_host(cloud: Cloud, capsys: pytest.CaptureFixture[str]):
    denied = "ERROR: (gcloud.storage.rsync) HTTPError 403: mine does not have storage.objects.list access"
    cloud.expect({"match": f"storage rsync {STORE}", "code": 1, "stderr": denied})
    (cloud.root / "go").touch()
    code, out, _ = ended(launch("--delete"), capsys)
    assert code == 0
    assert f"--store={STORE}" in out


UNAVAILABLE = {"code": 1, "stderr": "ERROR: gcloud crashed: HTTPError 503: Unavailable"}


@pytest.mark.parametrize(("match", "times"), [("storage rsync", 1), ("tpu-vm list", 5)])
def test_unreachable_service_ends_with_exit_code_75(
    match: str, times: int, cloud: Cloud, capsys: pytest.CaptureFixture[str]
):
    cloud.expect(*[{"match": match, **UNAVAILABLE}] * times)
    code, _, message = ended(launch(), capsys)
    assert code == EXIT_TRY_AGAIN, message
    assert "503" in message


def test_long_outage_is_reported_with_the_node_that_is_billed(
    cloud: Cloud, capsys: pytest.CaptureFixture[str]
):
    cloud.expect(
        {"match": "follow 1", "line": "step 5", "then": "drop"},
        *[{"match": "tpu-vm list", "after": 2 * (n == 0), **UNAVAILABLE} for n in range(5)],
    )
    code, _, message = ended(launch("--delete"), capsys)
    assert code == EXIT_TRY_AGAIN
    assert "503" in message
    assert STOP in message


def test_failed_deletion_is_reported_with_the_node(cloud: Cloud, capsys: pytest.CaptureFixture[str]):
    (cloud.root / "go").touch()
    cloud.expect(*[{"match": "tpu-vm delete", **UNAVAILABLE}] * 5)
    code, _, message = ended(launch("--delete"), capsys)
    assert code == EXIT_TRY_AGAIN
    assert STOP in message


def test_node_whose_creation_is_uncertain_is_reported(cloud: Cloud, capsys: pytest.CaptureFixture[str]):
    cloud.expect({"match": "tpu-vm create", **UNAVAILABLE})
    code, _, message = ended(launch(), capsys)
    assert code == EXIT_TRY_AGAIN
    assert STOP in message


def test_missing_gcloud_is_reported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("PATH", "/nowhere")
    code, _, message = ended(["status", *PLACE], capsys)
    assert code == EXIT_USER_ERROR
    assert message.startswith("error: gcloud: ")
