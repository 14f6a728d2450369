"""trainer.launch with the real trainer: installed from a wheel on the `TPU VM`, preempted, resumed on another, finished."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fake_cloud import CLOUD, Cloud
from trainer.launch import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_preempted_run_finishes_on_another_machine(
    tmp_path: Path,
    published_store: Path,
    data_dir: Path,
    teacher_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    cloud = Cloud(tmp_path / "cloud").build()
    monkeypatch.setenv(CLOUD, str(cloud.root))
    pyenv = [str(path) for path in Path.home().glob(".pyenv/versions/3.12.*/bin")]
    path = ":".join([str(cloud.root / "bin"), *pyenv, str(Path(sys.executable).parent), "/usr/bin:/bin"])
    if shutil.which("python3.12", path=path) is None:
        pytest.skip("needs Python 3.12, which the TPU environment has")
    monkeypatch.setenv("PATH", path)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # without a TPU, libtpu asks for its place for minutes
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "3")
    for name, source in {"store": published_store, "data": data_dir, "teacher": teacher_path}.items():
        shutil.copytree(source, cloud.bucket(f"gs://bucket/{name}"))
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", tmp_path, ROOT], check=True)
    run = "gs://bucket/run"
    saved = f"{run}/checkpoints/checkpoint"
    cloud.expect({"match": "follow 1", "line": "tiny on small_photos", "saved": saved, "then": "preempt"})
    code = main(
        [
            *("launch", "--tpu=whole", "--zone=z", "--project=p", "--type=v5e-8", "--spot", "--delete"),
            *(
                f"--wheel={next(tmp_path.glob('*.whl'))}",
                "--store=gs://bucket/store",
                "--data_dir=gs://bucket/data",
            ),
            *(
                "--teacher=gs://bucket/teacher",
                f"--workdir={run}",
                "--save_seconds=1",
                "--poll_seconds=0",
                "--",
            ),
            *(
                "--strategy=default",
                "--student=tiny",
                "--batch_size=5",
                "--epochs=150",
                "--checkpoint_every=10",
            ),
        ]
    )
    out = capsys.readouterr().out
    assert code == 0, out
    assert cloud.verbs().count("tpu-vm create") == 2
    assert "continuing at step " in out
    files = cloud.bucket(run)
    result = json.loads((files / "result.json").read_text())
    assert result["steps"] == 150 * 17 // 5
    assert result["first_step"] > 0
    assert (files / "student" / "saved_model.pb").exists()
    lines = [json.loads(line) for line in (files / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if line["kind"] == "train"]
    assert steps == sorted(set(steps))
    assert steps[-1] == result["steps"]
    assert cloud.read("node.json") is None
