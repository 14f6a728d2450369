"""Every command answers `--help` and mistakes at once, before TensorFlow, TFDS, Beam or Matplotlib is imported."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CPU_SECONDS = 1.0  # user plus system time: what else runs on the machine adds nothing to it


@dataclasses.dataclass(frozen=True)
class Answer:
    code: int
    seconds: float
    out: str
    err: str


def answer(module: str, *arguments: str, cwd: Path = ROOT) -> Answer:
    """Runs `python -m module`, and measures the child itself."""
    with subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        out, err = process.stdout.read(), process.stderr.read()  # type: ignore[union-attr]
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    return Answer(process.returncode, usage.ru_utime + usage.ru_stime, out, err)


TPU = ("--tpu=t", "--zone=z", "--project=p")
LAUNCH = (*("launch", *TPU, "--type=v3-8", "--image=i", "--workdir=gs://b/w", "--data_dir=/d", "--dry_run"),)
# Command -> what makes it whole apart from the mistake; a misspelt flag and its right spelling; a missing path; an
# impossible value. None where the command has no such flag.
CASES: dict[str, tuple[list[str], tuple[str, str], list[str] | None, list[str] | None]] = {
    "pipeline.precompute": (
        ["--runner=DirectRunner"],
        ("--epoch=3", "--epochs"),
        ["--dataset=d", "--store=s", "--teacher=nowhere"],
        ["--area_range=0.5,2"],
    ),
    "pipeline.verify": (
        ["--store=store"],
        ("--fractoin=1", "--fraction"),
        ["--store=nowhere"],
        ["--fraction=2"],
    ),
    "pipeline.inspect": (
        ["--store=store"],
        ("--checksum", "--checksums"),
        ["--store=nowhere"],
        ["--views=0"],
    ),
    "pipeline.plan": (
        [],
        ("--student=3", "--students"),
        ["--dataset=d", "--teacher=nowhere"],
        ["--codec=int4"],
    ),
    "pipeline.dataset": (
        ["import", "--data_dir=d"],
        ("--nam=x", "--name"),
        ["--name=x", "--folder=nowhere"],
        ["--data_dir=s3://bucket/d"],
    ),
    "trainer.train": (
        ["--store=store", "--workdir=w"],
        ("--learning_rat=1", "--learning_rate"),
        ["--store=nowhere"],
        ["--student=huge"],
    ),
    "trainer.compare": (
        ["--store=store", "--workdir=w"],
        ("--seed=1", "--seeds"),
        ["--store=nowhere"],
        ["--arms=sideways"],
    ),
    "trainer.evaluate": (
        ["--store=store", "--student=model.keras"],
        ("--studnet_output=a", "--student_output"),
        ["--student=nowhere"],
        ["--student_value_range=0..2"],
    ),
    "trainer.teacher": (
        ["finetune", "--model=tiny", "--output=o", "--workdir=w"],
        ("--step=1", "--steps"),
        ["--dataset=d", "--data_dir=nowhere"],
        ["--policy=heavy"],
    ),
    "trainer.launch": (
        [*LAUNCH, "--store=/s"],
        ("--detatch", "--detach"),
        None,
        ["--", "--student=nonsense"],
    ),
    "trainer.demo": ([], ("--workdi=w", "--workdir"), None, ["--workdir=s3://bucket/w"]),
}


@pytest.fixture
def place(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A directory with the outside of a store. Skips the command that needs Beam where it is not installed."""
    if request.node.callspec.params["command"] == "pipeline.precompute":
        request.getfixturevalue("beam")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "spec.json").write_text("{}")
    (tmp_path / "model.keras").touch()
    return tmp_path


def commands() -> set[str]:
    """All modules that are commands of the user's."""
    found = set()
    for package in ("pipeline", "trainer"):
        for path in (ROOT / package).rglob("*.py"):
            if re.search(r'^    run_module\("([\w.]+)"', path.read_text(), re.MULTILINE):
                found.add(".".join(path.relative_to(ROOT).with_suffix("").parts))
    # Started by `trainer.compare` and `trainer.launch`.
    return found - {"trainer.run.child_runs", "trainer.comparison.measure", "trainer.cloud.check_store"}


def test_every_command_is_tried() -> None:
    assert {*CASES} == commands()


@pytest.mark.parametrize("command", CASES)
def test_help_is_answered_at_once(command: str, place: Path) -> None:
    given = [argument for argument in CASES[command][0] if not argument.startswith("-")]
    for arguments in ([], given):
        shown = answer(command, *arguments, "--help", cwd=place)
        assert shown.code == 0, shown.err
        assert shown.err == ""
        assert command in shown.out
        assert shown.seconds < CPU_SECONDS
        assert "default: None" not in shown.out
    assert "--debug" in shown.out
    if command.startswith("pipeline.") or command in (
        "trainer.train",
        "trainer.compare",
        "trainer.evaluate",
    ):  # groups, and two examples at the end
        groups, examples = shown.out.split("\nexamples:\n")
        assert len(re.findall(r"^\w[\w ]+:$", groups, re.MULTILINE)) > 2
        assert examples.count(f"python -m {command}") == 2


@pytest.mark.parametrize("command", CASES)
def test_a_mistake_is_answered_at_once(command: str, place: Path) -> None:
    given, (misspelt, meant), *others = CASES[command]
    misspelt_answer = answer(command, *given, misspelt, cwd=place)
    assert meant in misspelt_answer.err
    answers = [misspelt_answer]
    for mistake in filter(None, others):
        assert mistake is not None
        found = answer(command, *given, *mistake, cwd=place)
        assert mistake[-1].split("=")[-1] in found.err
        answers.append(found)
    for found in answers:
        assert found.code == 2, found.err
        assert found.err.count("\n") == 1
        assert found.err.startswith("error: ")
        assert found.out == ""
        assert found.seconds < CPU_SECONDS
    assert sorted(path.name for path in place.iterdir()) == ["model.keras", "store"]


# What goes on to TensorFlow.
WHOLE = {name: given for name, (given, *_) in CASES.items() if name not in ("trainer.demo", "trainer.launch")}
WHOLE["pipeline.dataset"] = [*WHOLE["pipeline.dataset"], "--folder=store", "--name=x"]


@pytest.mark.parametrize("command", WHOLE)
def test_an_interrupt_in_the_middle_of_the_imports_is_like_any_other(command: str, place: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", command, *WHOLE[command]],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:  # one a finished import
            if "tensorflow" in line or "apache_beam" in line:
                break
        process.send_signal(signal.SIGINT)
        rest = [line for line in process.stderr.read().splitlines() if not line.startswith("import time:")]
    assert process.returncode == 130
    assert len(rest) == 1
