"""trainer.cloud.tpu_job: the files copied to the host; whole jobs are in test_launch."""

from __future__ import annotations

from trainer.cloud.tpu_job import INSTALL_FILES, Job


def test_files_copied_to_the_host_are_in_the_checkout() -> None:
    job = Job(
        setup=("install", "x.whl"),
        files=INSTALL_FILES,
        workdir="gs://b/run",
        inputs={},
        flags=("--steps=1",),
        save_seconds=1,
    )
    assert [path.name for path in job.copied()] == [
        *("tpu_host.sh", "install.sh", "requirements-tpu.lock", "pyproject.toml"),
    ]
    assert all(path.is_file() for path in job.copied())
    assert job.start() == "bash tpu_host.sh start gs://b/run 1 -- --steps=1"
