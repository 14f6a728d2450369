"""trainer.cloud.gcloud: commands, answers and errors; gcloud's own parser checks the commands."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from pipeline.errors import UserError
from tests.gcloud_parser import refused_by_gcloud
from tests.launches import HOST_SCRIPT, PLACE, PULLED, launch
from trainer.cloud.gcloud import Answer, Lines, NodeRequest, Tpu, describe_failure, find, succeed
from trainer.launch import main

TPU = Tpu(name="n", zone="z", project="p")
COMMAND = TPU.list_nodes()


def python(text: str) -> list[str]:
    return [sys.executable, "-S", "-c", text, "list"]


def test_creation_has_the_requested_configuration():
    node = NodeRequest(
        type="v3-8",
        runtime_version="r",
        queued=False,
        capacity="spot",
        service_account="a@b",
        network=None,
        subnetwork="s",
        internal_ips=True,
    )
    assert TPU.create(node)[4:7] == ["create", "n", "--version=r"]
    for command in (TPU.create(node), TPU.create_queued(node)):
        expected = {
            "--accelerator-type=v3-8",
            "--spot",
            "--service-account=a@b",
            "--subnetwork=s",
            "--internal-ips",
        }
        assert expected <= set(command)
        assert not any(word.startswith("--network") for word in command)
        assert command[-3:] in (["--zone=z", "--project=p", "--quiet"],)


def test_empty_list_is_none_and_a_failure_is_an_error():
    assert find(python("print('[]')")) is None
    assert find(python('print(\'[{"state": "READY"}]\')')) == {"state": "READY"}
    with pytest.raises(UserError, match="denied"):
        succeed(python("import sys; sys.exit('WARNING: old\\nERROR: denied\\nmore')"))


@pytest.mark.parametrize(
    ("stderr", "expected"),
    [
        (
            "WARNING: w\nERROR: (gcloud.x) RESOURCE_EXHAUSTED: Quota",
            "(gcloud.x) RESOURCE_EXHAUSTED: Quota",
        ),
        ("ERROR: no account.\n\n  $ gcloud auth login\n", "no account. $ gcloud auth login"),
        ("ERROR: There is no more capacity", "There is no more capacity; try --queued"),
        ("something else\n", "something else"),
        ("", "exit code 1"),
    ],
)
def test_failure_is_described_in_one_line(stderr: str, expected: str):
    line = describe_failure(COMMAND, Answer(1, "", stderr))
    assert line.startswith(f"gcloud tpu-vm list: {expected}")
    assert "\n" not in line


def test_lines_are_followed_by_the_answer():
    lines = Lines(python("import sys; print('a', flush=True); print('b'); sys.exit('ERROR: lost')"))
    assert list(lines) == ["a", "b"]
    assert lines.answer == Answer(1, "", "ERROR: lost\n")


def test_command_is_ended_when_reading_stops():
    lines = Lines(python("import time\nprint('a', flush=True)\ntime.sleep(600)"))
    for line in lines:
        assert line == "a"
        break


def test_every_command_passes_gclouds_own_parser(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "trainer.tar.gz"
    file.touch()
    command_lines = [
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
    for argv in command_lines:
        assert main(argv) == 0
        printed += [line for line in capsys.readouterr().out.splitlines() if not line.startswith("# ")]
    assert all(line.startswith(("gcloud compute tpus ", "gcloud storage ")) for line in printed)
    # Also the commands of the host script, with its variables for arguments.
    on_host = re.findall(
        r"\bgcloud (?:storage|auth) .*?(?=\)? \|\|| > |;|$)", HOST_SCRIPT.read_text(), re.MULTILINE
    )
    assert len(on_host) == 8
    printed += on_host
    wrong = "gcloud compute tpus tpu-vm create flowers --zone=z --versoin=x"  # the parser refuses something
    refused = refused_by_gcloud([*printed, wrong], tmp_path)
    assert list(refused) == [wrong]
