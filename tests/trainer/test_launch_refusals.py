"""trainer.launch: what is refused, by gcloud, by the host or before anything costs; Ctrl-C says what is left."""

from __future__ import annotations

import pytest

from pipeline.errors import EXIT_DATA_ERROR, EXIT_INTERRUPTED, EXIT_TRY_AGAIN, EXIT_USER_ERROR
from tests.fake_cloud import Cloud
from tests.launches import PLACE, STOP, STORE, ended, launch

ASKED = (
    "interrupted: flowers was asked for and may come into being, and then costs; what became of it: `status`"
)
QUOTA = (
    "ERROR: (gcloud.compute.tpus.tpu-vm.create) RESOURCE_EXHAUSTED: Quota limit 'TPUV3' has been exceeded."
)


@pytest.mark.parametrize(
    ("event", "extra", "code", "expected"),
    [
        ({"match": "tpu-vm create", "code": 1, "stderr": QUOTA}, (), 2, "ask for quota in the console"),
        (
            {"match": "tpu-vm create", "code": 1, "stderr": "ERROR: There is no more capacity in the zone"},
            ("--spot",),
            2,
            "try --queued",
        ),
        (
            {"match": "tpu-vm create", "code": 1, "stderr": "ERROR: ALREADY_EXISTS: x"},
            (),
            2,
            "the name is taken",
        ),
        (
            {"match": "queued-resources create", "code": 1, "stderr": "ERROR: ALREADY_EXISTS: x"},
            ("--queued",),
            2,
            "the name is taken",
        ),
        (
            {"match": "describe", "code": 1, "stderr": "ERROR: UNAUTHENTICATED: no"},
            (),
            2,
            "run `gcloud auth login`",
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
    got, _, told = ended(launch(*extra), capsys)
    assert got == code
    assert told.startswith("error: gcloud ")
    assert expected in told
    created = event["match"] == "sh pull"
    assert (
        f"flowers is there and costs, the trainer is not started yet; delete it: {STOP}" in told
    ) == created


def test_ssh_that_never_gets_through_says_what_costs(cloud: Cloud, capsys: pytest.CaptureFixture[str]):
    closed = {"match": "tpu-vm scp", "code": 255, "stderr": "ssh: connect to host 1.2.3.4 port 22: timed out"}
    cloud.expect(*[closed] * 5)
    code, _, told = ended(launch(), capsys)
    assert code == EXIT_TRY_AGAIN
    assert "port 22: timed out; is port 22 open" in told
    assert f"flowers is there and costs, the trainer is not started yet; delete it: {STOP}" in told


def test_name_of_another_type_is_refused(cloud: Cloud, capsys: pytest.CaptureFixture[str]):
    cloud.create_node("v2-8")
    code, _, told = ended(launch(), capsys)
    assert code == EXIT_USER_ERROR
    assert told.startswith("error: --tpu=flowers: the name is taken by a v2-8, asked for v3-8")


def test_queued_resource_that_failed_says_why(cloud: Cloud, capsys: pytest.CaptureFixture[str]):
    data = {"failedData": {"error": {"message": "no v3 in this zone"}}}
    cloud.write("queue.json", {"states": ["FAILED"], "type": "v3-8", "data": data})
    code, _, told = ended(launch("--queued"), capsys)
    assert code == EXIT_USER_ERROR
    assert told.endswith(f"no v3 in this zone; it stays in the queue until it is deleted: {STOP}")


def test_node_that_somebody_deletes_is_not_created_again(cloud: Cloud, capsys: pytest.CaptureFixture[str]):
    cloud.expect({"match": "follow 1", "line": "step 5", "then": "delete"})
    code, _, told = ended(launch("--spot"), capsys)
    assert code == EXIT_TRY_AGAIN
    assert "somebody has deleted it" in told
    assert cloud.verbs().count("tpu-vm create") == 1


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        ({"match": "tpu-vm describe", "interrupt": True}, "interrupted: nothing was created"),
        (
            {"match": "tpu-vm create", "interrupt": True},
            f"{ASKED}; delete it: {STOP}",
        ),
        (
            {"match": "sh pull", "interrupt": True},
            f"interrupted: flowers is there and costs, the trainer is not started yet; delete it: {STOP}",
        ),
        (
            {"match": "follow 1", "line": "step 5", "then": "interrupt"},
            f"interrupted: flowers is there and costs, the trainer goes on there; delete it: {STOP}",
        ),
    ],
    ids=["before", "creating", "setting up", "training"],
)
def test_ctrl_c_says_what_runs_and_costs(
    event: dict, expected: str, cloud: Cloud, capsys: pytest.CaptureFixture[str]
):
    cloud.expect(event)
    code, _, told = ended(launch(), capsys)
    assert (code, told) == (EXIT_INTERRUPTED, expected)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (launch("--type=v3-32"), "--type=v3-32: a slice of 4 hosts; slices of a single host are supported"),
        (launch("--spot", "--reserved"), "give either --spot or --reserved"),
        (launch("--wheel=x.whl"), "give one of --image, --image_file and --wheel"),
        (launch("--workdir=/tmp/run"), "expected a gs:// URL: the disk of a TPU VM ends with it"),
        (
            launch("--stream_store", "--store=/disk/store"),
            "--stream_store: --store=/disk/store is no gs:// URL",
        ),
        (launch("--store=relative"), "--store=relative: expected a gs:// URL, or an absolute path"),
        (launch("--spott"), "unknown flag --spott; did you mean --spot?"),
        (launch(trainer=("--recipee=bit",)), "unknown flag --recipee=bit; did you mean --recipe?"),
        (launch(trainer=("--store=x",)), "--store=x: give it before `--`"),
        (launch("--dry_run", trainer=("--student=nonsense",)), "--student=nonsense"),
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
        (["stop", *PLACE, "--", "--seed=1"], "stop takes nothing after `--`"),
    ],
)
def test_mistakes_cost_nothing(
    argv: list[str], expected: str, cloud: Cloud, capsys: pytest.CaptureFixture[str]
):
    code, _, told = ended(argv, capsys)
    assert code == EXIT_USER_ERROR
    assert expected in told
    assert cloud.calls() == []


@pytest.mark.parametrize(
    ("argv", "code", "expected"),
    [
        (launch(trainer=("--epochs=99",)), EXIT_USER_ERROR, "the store holds 51"),
        (launch(trainer=("--recipe=keras_example",)), EXIT_USER_ERROR, "--recipe=keras_example"),
        (launch(trainer=("--eval_split=nonsense",)), EXIT_USER_ERROR, "nonsense"),
        (launch("--stream_store", trainer=("--steps=99",)), EXIT_USER_ERROR, "the store holds 51"),
        (launch("--store=gs://bucket/typo"), EXIT_USER_ERROR, "--store=gs://bucket/typo"),
        (launch("--data_dir=gs://bucket/typo"), EXIT_USER_ERROR, "--data_dir=gs://bucket/typo"),
        (launch("--teacher=gs://bucket/typo.keras"), EXIT_USER_ERROR, "--teacher=gs://bucket/typo.keras"),
    ],
)
def test_flags_that_the_store_does_not_allow_cost_nothing(
    argv: list[str], code: int, expected: str, cloud: Cloud, capsys: pytest.CaptureFixture[str]
):
    got, _, told = ended(argv, capsys)
    assert (got, told[:7]) == (code, "error: ")
    assert expected in told
    assert cloud.verbs() == []  # no node was asked for


def test_damaged_store_is_noticed_before_anything_costs(cloud: Cloud, capsys: pytest.CaptureFixture[str]):
    (cloud.bucket(STORE) / "manifest.json").write_text("{")
    code, _, told = ended(launch(), capsys)
    assert code == EXIT_DATA_ERROR
    assert f"{STORE}/manifest.json" in told
    assert cloud.verbs() == []


def test_store_that_this_account_may_not_read_is_left_to_the_host(
    cloud: Cloud, capsys: pytest.CaptureFixture[str]
):
    denied = "ERROR: (gcloud.storage.rsync) HTTPError 403: mine does not have storage.objects.list access"
    cloud.expect({"match": f"storage rsync {STORE}", "code": 1, "stderr": denied})
    (cloud.root / "go").touch()
    code, out, _ = ended(launch("--delete"), capsys)
    assert code == 0
    assert f"--store={STORE}: not checked" in out


def test_service_that_does_not_answer_is_to_be_asked_again(cloud: Cloud, capsys: pytest.CaptureFixture[str]):
    for match in ("storage rsync", "tpu-vm describe"):
        cloud.expect(
            {"match": match, "code": 1, "stderr": "ERROR: gcloud crashed: HTTPError 503: Unavailable"}
        )
        code, _, told = ended(launch(), capsys)
        assert code == EXIT_TRY_AGAIN, told
        assert "503" in told


def test_machine_without_gcloud_is_told_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("PATH", "/nowhere")
    code, _, told = ended(["status", *PLACE], capsys)
    assert (code, told.split(";")[0]) == (EXIT_USER_ERROR, "error: gcloud: no such command")
