"""docs/clusters.md and docs/tpu.md: the programs' own parsers accept all commands."""

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
    """The commands, with their variables substituted."""
    return [command for page in PAGES for command in command_lines(page)]


def test_gcloud_commands_pass_gclouds_parser(commands: list[str], tmp_path: Path):
    gcloud = [command for command in commands if command.startswith("gcloud ")]
    assert len(gcloud) > 10
    assert refused_by_gcloud(gcloud, tmp_path) == {}


def test_launch_commands_are_dry_run(commands: list[str], capsys: pytest.CaptureFixture[str]):
    launches = [shlex.split(command)[3:] for command in commands if "trainer.launch" in command]
    assert [argv[0] for argv in launches] == ["launch", "status", "logs", "stop"]
    for argv in launches:
        assert main([argv[0], "--dry_run", *argv[1:]]) == 0
        assert "gcloud compute tpus " in capsys.readouterr().out


def test_precompute_and_plan_accept_their_flags(commands: list[str], monkeypatch: pytest.MonkeyPatch):
    # Beam's check of the options requests the policy of the bucket and searches for credentials for two minutes.
    monkeypatch.setattr(GoogleCloudOptions, "_warn_if_soft_delete_policy_enabled", lambda *_: None)
    precomputes = [shlex.split(command)[3:] for command in commands if "pipeline.precompute" in command]
    assert any("--runner=DataflowRunner" in argv for argv in precomputes)
    for argv in precomputes:
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
