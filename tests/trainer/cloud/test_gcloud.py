"""trainer.cloud.gcloud: commands, and what answers mean; the commands' grammar is tested with trainer.launch."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from pipeline.errors import UserError
from tests.gcloud_parser import refused_by_gcloud
from tests.launches import HOST_SCRIPT, PLACE, PULLED, launch
from trainer.cloud.gcloud import Answer, Lines, NodeRequest, Tpu, ask_for, refusal, succeed
from trainer.launch import main

TPU = Tpu(name="n", zone="z", project="p")
COMMAND = TPU.describe()


def python(text: str) -> list[str]:
    return [sys.executable, "-S", "-c", text, "describe"]


def test_creation_names_what_was_asked_for():
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


def test_what_is_not_there_is_none_and_what_fails_is_one_line():
    assert ask_for(python("import sys; sys.exit('ERROR: NOT_FOUND: x')")) is None
    assert ask_for(python('print(\'{"state": "READY"}\')')) == {"state": "READY"}
    with pytest.raises(UserError, match=r"ERROR? ?.*denied|denied"):
        succeed(python("import sys; sys.exit('WARNING: old\\nERROR: denied\\nmore')"))


@pytest.mark.parametrize(
    ("stderr", "expected"),
    [
        (
            "WARNING: w\nERROR: (gcloud.x) RESOURCE_EXHAUSTED: Quota",
            "(gcloud.x) RESOURCE_EXHAUSTED: Quota; ask for quota",
        ),
        ("ERROR: PERMISSION_DENIED: no", "PERMISSION_DENIED: no; this account may not do that"),
        ("something else\n", "something else"),
        ("", "exit code 1"),
    ],
)
def test_refusal_is_one_line_with_the_remedy(stderr: str, expected: str):
    line = refusal(COMMAND, Answer(1, "", stderr))
    assert line.startswith(f"gcloud tpu-vm describe: {expected}")
    assert "\n" not in line


def test_lines_come_as_they_are_printed_and_the_end_is_told():
    lines = Lines(python("import sys; print('a', flush=True); print('b'); sys.exit('ERROR: lost')"))
    assert list(lines) == ["a", "b"]
    assert lines.answer == Answer(1, "", "ERROR: lost\n")


def test_command_that_nobody_listens_to_any_more_is_ended():
    lines = Lines(python("import time\nprint('a', flush=True)\ntime.sleep(600)"))
    for line in lines:
        assert line == "a"
        break


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
    assert all(line.startswith(("gcloud compute tpus ", "gcloud storage ")) for line in printed)
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
