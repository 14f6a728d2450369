"""docs/clusters.md and docs/tpu.md: each command of Docker, gcloud, Beam and the launcher is read by what would run it."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from apache_beam.options.pipeline_options import GoogleCloudOptions

from pipeline.flags.precompute import make_parser, view_recipe_of
from pipeline.plan import main as plan
from pipeline.precompute import beam_options
from tests.documents import ROOT, command_lines
from tests.gcloud_parser import refused_by_gcloud
from trainer.launch import main

PAGES = [ROOT / "docs" / "clusters.md", ROOT / "docs" / "tpu.md"]


@pytest.fixture(scope="module")
def commands() -> list[str]:
    """Each command, with its variables filled in."""
    return [command for page in PAGES for command in command_lines(page)]


def test_gcloud_commands_pass_gclouds_parser(commands: list[str], tmp_path: Path):
    asked = [command for command in commands if command.startswith("gcloud ")]
    assert len(asked) > 10
    assert refused_by_gcloud(asked, tmp_path) == {}


def test_launch_commands_are_dry_run(commands: list[str], capsys: pytest.CaptureFixture[str]):
    asked = [shlex.split(command)[3:] for command in commands if "trainer.launch" in command]
    assert [argv[0] for argv in asked] == ["launch", "status", "logs", "stop"]
    for argv in asked:
        assert main([argv[0], "--dry_run", *argv[1:]]) == 0
        assert "gcloud compute tpus " in capsys.readouterr().out


def test_precompute_and_plan_take_their_flags(commands: list[str], monkeypatch: pytest.MonkeyPatch):
    # Beam's check of the options asks the bucket for its policy, and looks for credentials for two minutes.
    monkeypatch.setattr(GoogleCloudOptions, "_warn_if_soft_delete_policy_enabled", lambda *_: None)
    asked = [shlex.split(command)[3:] for command in commands if "pipeline.precompute" in command]
    assert any("--runner=DataflowRunner" in argv for argv in asked)
    for argv in asked:
        parser = make_parser()
        flags, rest = parser.parse_known_args(argv)
        view_recipe_of(flags)
        beam_options(rest, parser)
    (argv,) = [shlex.split(command)[3:] for command in commands if "pipeline.plan" in command]
    assert plan(argv) == 0


def test_docker_builds_name_files_and_arguments_that_exist(commands: list[str]):
    builds = [shlex.split(command) for command in commands if command.startswith("docker build")]
    assert len(builds) == 3
    for words in builds:
        dockerfile = ROOT / words[words.index("--file") + 1]
        argument = words[words.index("--build-arg") + 1].split("=")[0]
        assert f"\nARG {argument}=" in dockerfile.read_text()
