"""docker/*.Dockerfile: linters, and consistency with the rest of the project."""

from __future__ import annotations

import fnmatch
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
SCRIPTS = [
    ROOT / "docker" / "install.sh",
    ROOT / "trainer" / "cloud" / "templates" / "tpu_host.sh",
    ROOT / ".ci" / "run",
]


def linter(name: str) -> str:
    """Path of a linter; skips the test where it is not installed."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}") or shutil.which(name)
    if found is None:
        pytest.skip(f"needs {name}")
    return found


def instructions(path: Path) -> list[tuple[str, str]]:
    """Name and arguments of each instruction, with continued lines joined."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    text = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split()[0], line.partition(" ")[2]) for line in text.splitlines() if line.strip()]


def stages(path: Path) -> list[list[tuple[str, str]]]:
    """Instructions by stage, starting with FROM."""
    out: list[list[tuple[str, str]]] = []
    for name, words in instructions(path):
        if name == "FROM":
            out.append([])
        if out:
            out[-1].append((name, words))
    return out


def test_dockerfiles_pass_hadolint():
    done = subprocess.run([linter("hadolint"), *DOCKERFILES], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_scripts_pass_shellcheck():
    # SC2329 reports functions that are never called; the arguments call them by name.
    done = subprocess.run(
        [linter("shellcheck"), "--exclude=SC2329", *SCRIPTS], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.name)
def test_image_has_another_user_than_root_and_a_health_check(path: Path):
    last = dict(stages(path)[-1])
    assert last["USER"].isdecimal()
    assert last["USER"] != "0"
    assert "/opt/healthcheck.py" in last["HEALTHCHECK"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.name)
def test_change_of_code_rebuilds_one_layer(path: Path):
    final = stages(path)[-1]
    layers = [(name, words) for name, words in final if name in ("RUN", "COPY", "ADD")]
    depends = [words for name, words in layers if "from=package" in words]
    assert depends == [layers[-1][1]]
    needed = [stage for stage in stages(path) if stage[0][1].endswith(" AS dependencies")]
    (copied,) = (words.split() for name, words in needed[0] if name == "COPY")
    assert copied[0] == "docker/install.sh"
    assert copied[-2:] == ["pyproject.toml", "./"]
    assert all(name.startswith("requirements") for name in copied[1:-2])


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.name)
def test_dockerignore_includes_all_copied_files(path: Path):
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    included = {line[1:].removesuffix("/**") for line in ignored if line.startswith("!")}
    for name, words in instructions(path):
        if name == "COPY" and not words.startswith("--from"):
            for source in words.split()[:-1]:
                assert any(fnmatch.fnmatch(source, pattern) for pattern in included)
                assert (ROOT / source).exists()


def found(pattern: str, path: Path) -> str:
    """The group of a pattern in a file."""
    match = re.search(pattern, path.read_text())
    assert match is not None
    return match.group(1)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.name)
def test_keras_2_is_chosen_where_tensorflow_has_keras_3(path: Path):
    """A Beam worker is no command of ours, which would choose it."""
    chosen = {
        stage[0][1].rpartition(" ")[2]: ("ENV", "TF_USE_LEGACY_KERAS=1") in stage
        for stage in stages(path)
        if " AS python-" in stage[0][1]
    }
    assert chosen == {"python-3.11": False, "python-3.12": True, "python-3.13": True}


def test_versions_are_those_of_the_project():
    beam = found(r"BEAM_VERSION=(\S+)", ROOT / "docker" / "precompute.Dockerfile")
    assert f"apache-beam=={beam}\n" in (ROOT / "requirements.lock").read_text()
    uv = found(r"UV_VERSION := (\S+)", ROOT / "Makefile")
    assert uv == found(r"UV_VERSION=(\S+)", SCRIPTS[0])
    assert [found(r"uv==(\S+)", path) for path in DOCKERFILES] == [uv, uv]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"].startswith(">=3.11,")
    assert [found(r"ARG PYTHON=(\S+)", path) for path in DOCKERFILES] == ["3.11", "3.11"]
