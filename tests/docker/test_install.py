"""docker/install.sh: installation in clean environments, and the use of each environment."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests import stores

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "docker" / "install.sh"


def install(*arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    # Interpreters of pyenv, which uv would download otherwise.
    found = sorted(Path.home().glob(".pyenv/versions/*/bin"), reverse=True)
    path = ":".join([*map(str, found), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path}
    done = subprocess.run(
        ["bash", SCRIPT, *arguments], capture_output=True, text=True, timeout=1200, env=environment
    )
    assert done.returncode == code, done.stderr[-2000:]
    return done


def run(venv: Path, *arguments: str | Path, directory: Path) -> str:
    """Output of the environment's Python, outside of the checkout and without this process's environment."""
    kept = {name: os.environ[name] for name in ("HOME", "PATH") if name in os.environ}
    # Beam and Docker find programs through the environment's own PATH.
    environment = {**kept, "PATH": f"{venv / 'bin'}:{kept['PATH']}", "TF_CPP_MIN_LOG_LEVEL": "3"}
    environment["TPU_SKIP_MDS_QUERY"] = "1"  # without a TPU, libtpu asks for its place for minutes
    done = subprocess.run(
        [venv / "bin" / "python", *arguments],
        cwd=directory,
        env={**environment, "VIEW_DISTILL_CACHE": str(directory / "cache")},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def packages(venv: Path) -> dict[str, str]:
    """Installed distributions and their versions."""
    listed = subprocess.run(
        [venv / "bin" / "pip", "list", "--format=json"], capture_output=True, text=True, check=True
    )
    return {
        package["name"].lower().replace("_", "-"): package["version"] for package in json.loads(listed.stdout)
    }


def locked() -> dict[str, str]:
    """Versions of requirements.lock."""
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith((" ", "#")))


@pytest.fixture(scope="session")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Beam worker's environment."""
    venv = tmp_path_factory.mktemp("worker") / "venv"
    install("dependencies", "precompute", "cpu", "3.11", venv)
    install("package", ROOT, venv)
    return venv


@pytest.fixture(scope="session")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trainer's environment, with the project installed from a wheel as in the image and on a TPU VM."""
    directory = tmp_path_factory.mktemp("trainer")
    install("dependencies", "trainer", "cpu", "3.11", directory / "venv")
    build = [
        directory / "venv" / "bin" / "python",
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
    ]
    subprocess.run([*build, directory, ROOT], check=True)
    install("package", next(directory.glob("*.whl")), directory / "venv")
    return directory / "venv"


@pytest.mark.slow
def test_each_image_has_only_its_own_packages_in_locked_versions(worker: Path, trainer: Path):
    lock = {**locked(), "tensorflow-cpu": locked()["tensorflow"]}
    for venv in (worker, trainer):
        found = packages(venv)
        assert "view-distill" in found
        assert {
            name: v for name, v in found.items() if name in lock and lock[name] != v and name != "setuptools"
        } == {}
        assert not set(found) & {"pytest", "ruff", "mypy", "matplotlib"}
    assert "apache-beam" in packages(worker)
    assert "tensorflow-addons" not in packages(worker)
    assert "tensorflow-addons" in packages(trainer)
    assert "apache-beam" not in packages(trainer)


@pytest.mark.slow
def test_health_check_passes_in_both_images(worker: Path, trainer: Path, tmp_path: Path):
    check = ROOT / "docker" / "healthcheck.py"
    assert "replayed 12 views" in run(worker, check, directory=tmp_path)
    assert "figures: " in run(trainer, check, directory=tmp_path)


@pytest.mark.slow
def test_trainer_image_replays_the_store_of_the_worker_image(
    worker: Path, trainer: Path, data_dir: Path, teacher_path: Path, published_store: Path, tmp_path: Path
):
    asked = stores.Asked(data_dir, teacher_path, tmp_path / "store")
    # The worker process is `apache_beam.runners.worker.sdk_worker_main` in that environment.
    processes = ("--direct_running_mode=multi_processing", "--direct_num_workers=1")
    assert "51 views" in run(
        worker, "-m", "pipeline.precompute", *asked.flags(*processes), directory=tmp_path
    )
    assert stores.shard_files(asked.store) == stores.shard_files(published_store)
    argv = [f"--store={asked.store}", f"--data_dir={data_dir}", f"--workdir={tmp_path / 'run'}"]
    small = ["--student=tiny", "--batch_size=5", "--steps=4", "--warmup_steps=1"]
    run(trainer, "-m", "trainer.train", *argv, *small, directory=tmp_path)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 4


@pytest.mark.slow
def test_worker_image_can_import_the_dataflow_runner(worker: Path, tmp_path: Path):
    words = (
        "from apache_beam.runners.dataflow.internal import apiclient\n"
        "from apache_beam.io.gcp import gcsfilesystem\n"
        "from apache_beam.runners.runner import create_runner\n"
        "print(create_runner('DataflowRunner'))"
    )
    assert "DataflowRunner" in run(worker, "-W", "ignore", "-c", words, directory=tmp_path)


def test_mistakes_are_reported_in_one_line():
    assert install(code=2).stderr.startswith("error: ")
    done = install("dependencies", "trainr", "cpu", "3.11", "/nowhere/venv", code=2)
    assert done.stderr.splitlines()[-1].startswith("error: trainr: ")
    done = install("dependencies", "trainer", "tpu", "3.11", "/nowhere/venv", code=2)
    assert "tpu with Python 3.11" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("image", "variant", "python"),
    [("precompute", "cpu", "3.13"), ("trainer", "cpu", "3.12"), ("trainer", "tpu", "3.12")],
)
def test_other_environments_pass_the_health_check(image: str, variant: str, python: str, tmp_path: Path):
    venv = tmp_path / "venv"
    install("dependencies", image, variant, python, venv)
    install("package", ROOT, venv)
    found = packages(venv)
    assert "tensorflow" not in found
    assert {"tensorflow-tpu", "libtpu"} <= set(found) or "tensorflow-cpu" in found
    said = run(venv, ROOT / "docker" / "healthcheck.py", directory=tmp_path)
    assert ("replayed 12 views" if image == "precompute" else "figures: ") in said
