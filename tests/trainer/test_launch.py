"""trainer.launch: whole lives of a job, with a recording program in front of gcloud; processes on the `TPU VM` are real."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pipeline.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR, run_command
from tests.fake_cloud import CLOUD, Cloud
from tests.gcloud_parser import refused_by_gcloud
from trainer import tpu_job
from trainer.launch import main
from trainer.tpu_job import EXIT_TERMINATED, EXIT_TRY_AGAIN

PLACE = ("--tpu=flowers", "--zone=us-central1-a", "--project=mine")
STORE, DATA, RUN = "gs://bucket/store", "gs://bucket/data", "gs://bucket/runs/one"
PULLED = "--image=us-central1-docker.pkg.dev/mine/view-distill/trainer:tpu"
ASKED = (
    "interrupted: flowers was asked for and may come into being, and then costs; what became of it: `status`"
)
STOP = "python -m trainer.launch stop --tpu=flowers --zone=us-central1-a --project=mine --delete"

HOST_SCRIPT = Path(tpu_job.__file__).parent / "templates" / "tpu_host.sh"

# In place of the trainer: ten steps, each saved; at step 5 it waits for a file `go`.
TRAINER = """#!/usr/bin/env bash
[[ -f inputs/store/spec.json && -d inputs/data_dir ]] || { echo "error: no store"; exit 2; }
[[ "$*" != *--seed=13* ]] || { echo "error: unlucky"; exit 3; }
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


@pytest.fixture
def cloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cloud:
    made = Cloud(tmp_path / "cloud").build()
    monkeypatch.setenv(CLOUD, str(made.root))
    monkeypatch.setenv("PATH", f"{made.root / 'bin'}:/usr/bin:/bin")
    trainer = made.root / "bin" / "python"
    trainer.write_text(TRAINER)
    trainer.chmod(0o755)
    made.bucket(STORE).mkdir(parents=True)
    (made.bucket(STORE) / "spec.json").write_text("{}")
    made.bucket(DATA).mkdir()
    yield made
    made.end_machine(state=None)


def launch(*extra: str, trainer: tuple[str, ...] = ()) -> list[str]:
    """Arguments of a launch."""
    return [
        *(
            "launch",
            *PLACE,
            "--type=v3-8",
            PULLED,
            f"--store={STORE}",
            f"--data_dir={DATA}",
            f"--workdir={RUN}",
        ),
        *("--save_seconds=1", "--poll_seconds=0", *extra, "--", "--batch_size=8", *trainer),
    ]


def let_go(cloud: Cloud) -> None:
    """The trainer goes past step 5."""
    (cloud.root / "go").touch()


def ended(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, output and the last line on standard error of the command."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        run_command(main, argv)
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    assert isinstance(exit_info.value.code, int)
    return exit_info.value.code, printed.out, (printed.err.splitlines() or [""])[-1]


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


def test_bucket_that_does_not_answer_is_not_taken_for_a_new_run(
    cloud: Cloud, capsys: pytest.CaptureFixture[str]
):
    cloud.expect({"match": f"storage ls {RUN}/", "code": 1, "stderr": "ERROR: 503 try later"})
    code, out, _ = ended(launch(), capsys)
    assert code == 74
    assert "ERROR: 503 try later" in out
    assert "from step" not in out
    assert not cloud.bucket(RUN).exists()


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
        (launch("--store=relative"), "--store=relative: expected a gs:// URL, or an absolute path"),
        (launch("--spott"), "unknown flag --spott; did you mean --spot?"),
        (launch(trainer=("--recipee=bit",)), "unknown flag --recipee=bit; did you mean --recipe?"),
        (launch(trainer=("--store=x",)), "--store=x: give it before `--`"),
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


def test_machine_without_gcloud_is_told_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("PATH", "/nowhere")
    code, _, told = ended(["status", *PLACE], capsys)
    assert (code, told.split(";")[0]) == (EXIT_USER_ERROR, "error: gcloud: no such command")


def test_every_command_passes_gclouds_own_parser(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "trainer.tar.gz"
    file.touch()
    asked = [
        launch("--dry_run", trainer=("--recipe=bit_flowers_fast",)),
        launch("--dry_run", "--queued", "--spot", "--teacher=gs://bucket/teacher.keras"),
        launch("--dry_run", "--reserved", "--service_account=a@mine.iam.gserviceaccount.com", "--type=v5e-8"),
        launch(
            "--dry_run",
            "--queued",
            "--internal_ips",
            "--network=n",
            "--subnetwork=s",
            "--store=/mnt/disks/store",
        ),
        [a if a != PULLED else f"--image_file={file}" for a in launch("--dry_run")],
        ["status", *PLACE, "--dry_run"],
        ["logs", *PLACE, "--dry_run", "--follow", "--internal_ip"],
        ["logs", *PLACE, "--dry_run"],
        ["stop", *PLACE, "--dry_run", "--delete"],
    ]
    printed = []
    for argv in asked:
        assert main(argv) == 0
        printed += [line for line in capsys.readouterr().out.splitlines() if not line.startswith("# ")]
    assert all(line.startswith("gcloud compute tpus ") for line in printed)
    # And what the host's script asks, with its own variables for arguments.
    on_host = re.findall(
        r"\bgcloud (?:storage|auth) .*?(?= \|\|| > |;|$)", HOST_SCRIPT.read_text(), re.MULTILINE
    )
    assert len(on_host) == 8
    printed += on_host
    wrong = (
        "gcloud compute tpus tpu-vm create flowers --zone=z --versoin=x"  # the parser is asked, and answers
    )
    refused = refused_by_gcloud([*printed, wrong], tmp_path)
    assert list(refused) == [wrong]
