"""trainer.run.workdir: new directories and those of earlier runs are accepted, others refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline.errors import UserError
from trainer.run.workdir import open_workdir


@pytest.mark.parametrize(
    "names",
    [
        [],
        [".lock"],
        [
            ".lock",
            ".tmp-config.json-17",
            "config.json",
            "metrics.jsonl",
            "tensorboard",
        ],  # before a checkpoint
        ["checkpoints", "config.json"],
    ],
)
def test_new_directory_or_that_of_an_earlier_run_is_accepted(tmp_path: Path, names: list[str]):
    workdir = tmp_path / "deep" / "run"
    for name in names:
        (workdir / name).mkdir(parents=True)
    assert open_workdir(str(workdir)) == workdir
    assert sorted(path.name for path in workdir.iterdir()) == names


@pytest.mark.parametrize(
    "names",
    [
        ["thesis.tex"],
        [".tmp-mine"],
        [".lock", "spec.json"],
        [".lock", "thesis.tex"],
        [".lock", "comparison.json", "result.json", "runs"],
        ["checkpoints", "comparison.json"],
    ],
)
def test_directory_of_something_else_is_refused(tmp_path: Path, names: list[str]):
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(UserError) as error:
        open_workdir(str(tmp_path))
    assert f"--workdir={tmp_path}" in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == names


@pytest.mark.parametrize("where", [".", "stores/a", "link/a"])
def test_store_inside_the_workdir_is_refused(tmp_path: Path, where: str):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "stores" / "a").mkdir(parents=True)
    (tmp_path / "run" / "link").symlink_to(tmp_path / "run" / "stores")
    (tmp_path / "way").symlink_to(tmp_path / "run")
    for workdir in ("run", "way"):
        with pytest.raises(UserError, match=re.escape(f"--workdir={tmp_path}/{workdir}")):
            open_workdir(str(tmp_path / workdir), stores=[str(tmp_path / "run" / where)])
    beside = str(tmp_path / "running")
    assert open_workdir(str(tmp_path / "run"), stores=[beside]) == tmp_path / "run"
    assert open_workdir(str(tmp_path / "run"), stores=["gs://bucket/store"]) == tmp_path / "run"
