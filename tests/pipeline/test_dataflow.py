"""pipeline.precompute on Dataflow: the whole command against a service on loopback, which runs the staged job."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from apache_beam.internal import pickler
from apache_beam.portability.api import beam_runner_api_pb2
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from pipeline.precompute import ComputeShard, main
from pipeline.storage.bucket import BucketDirectory
from pipeline.storage.lock import LOCK_FILE
from tests.fake_dataflow import ROOT, FakeDataflow, load
from tests.runs import fail
from tests.stores import Asked

pytest.importorskip("google.cloud.dataflow", reason="the extra `dataflow` is not installed")

IMAGE = "us-central1-docker.pkg.dev/my-project/view-distill/precompute:gpu"
ACCELERATOR = "worker_accelerator=type:nvidia-tesla-t4;count:1;install-nvidia-driver"
# As in docs/clusters.md.
JOB = (
    *("--runner=DataflowRunner", "--project=my-project", "--region=us-central1"),
    *(f"--sdk_container_image={IMAGE}", "--sdk_location=container"),
    *(
        "--num_workers=8",
        "--max_num_workers=8",
        "--autoscaling_algorithm=NONE",
        "--machine_type=n1-standard-8",
    ),
    f"--dataflow_service_options={ACCELERATOR}",
    *("--experiments=no_use_multiple_sdk_containers", "--number_of_worker_harness_threads=1"),
)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[FakeDataflow]:
    with FakeDataflow(tmp_path) as service:
        yield service


@pytest.fixture
def remote(asked: Asked, gcs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Data set and teacher in the bucket, and a store to be made there."""
    monkeypatch.setenv("VIEW_DISTILL_CACHE", str(tmp_path / "cache"))
    bucket = BucketDirectory(gcs)
    for name, directory in (("data", asked.data_dir), ("teacher", asked.teacher)):
        for path in filter(Path.is_file, directory.rglob("*")):
            bucket.upload(path, f"{name}/{path.relative_to(directory).as_posix()}")
    places = {"data_dir": f"{gcs}/data", "teacher": f"{gcs}/teacher", "store": f"{gcs}/store"}
    return dataclasses.replace(asked, **places)


def flags(remote: Asked, service: FakeDataflow, *others: str) -> list[str]:
    """`localhost` is the only host that Beam takes with a port, and reaches by HTTP."""
    temp = str(remote.store).replace("/store", "/temp")
    endpoint = f"--dataflow_endpoint=http://localhost:{service.port}"
    return remote.flags(*JOB, f"--temp_location={temp}", endpoint, *others)


def authorize(service: FakeDataflow, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the key file of a service account whose tokens come from the service."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    account = {
        "type": "service_account",
        "project_id": "my-project",
        "private_key_id": "1",
        "private_key": key.decode(),
        "client_email": "worker@my-project.iam.gserviceaccount.com",
        "token_uri": f"http://localhost:{service.port}/token",
    }
    (directory / "key.json").write_text(json.dumps(account))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(directory / "key.json"))


def start(argv: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.precompute", *argv],
        cwd=ROOT,
        env=dict(os.environ),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def check_job(service: FakeDataflow, remote: Asked) -> None:
    """Compares what arrived at the service with the flags."""
    assert service.job is not None
    environment = service.job["environment"]
    (pool,) = environment["workerPools"]
    assert pool["machineType"] == "n1-standard-8"
    assert (pool["numWorkers"], pool["autoscalingSettings"]["maxNumWorkers"]) == (8, 8)
    assert pool["numThreadsPerWorker"] == 1
    (image,) = pool["sdkHarnessContainerImages"]
    assert image["containerImage"] == pool["workerHarnessContainerImage"] == IMAGE
    assert environment["serviceOptions"] == [ACCELERATOR]
    assert "no_use_multiple_sdk_containers" in environment["experiments"]
    assert "use_multiple_sdk_containers" not in environment["experiments"]
    # Nothing of the command's machine: the image has the code.
    staged = [package["name"] for package in pool["packages"]]
    assert staged == ["submission_environment_dependencies.txt"]  # informational
    directory = service.staged.rpartition("/")[0]
    assert directory.startswith(str(remote.store).replace("/store", "/temp/"))
    assert set(BucketDirectory(directory).objects()) == {*staged, "pipeline.pb"}


def check_pipeline(pipeline: beam_runner_api_pb2.Pipeline, remote: Asked) -> None:
    """Checks steps, environment and job of the staged pipeline."""
    transforms = pipeline.components.transforms.values()
    steps = {transform.unique_name.split("/")[0] for transform in transforms}
    assert {"CreatePendingShards", "Reshuffle", "ComputeShard", "CountShards"} <= steps
    images = {
        beam_runner_api_pb2.DockerPayload.FromString(found.payload).container_image
        for found in pipeline.components.environments.values()
    }
    assert images == {IMAGE}
    (payload,) = [t.spec.payload for t in transforms if t.unique_name == "ComputeShard"]
    do_fn, *_ = pickler.loads(beam_runner_api_pb2.ParDoPayload.FromString(payload).do_fn.payload)
    assert type(do_fn) is ComputeShard
    job = do_fn._job
    assert (job.store, job.data_dir, job.teacher) == (remote.store, remote.data_dir, remote.teacher)


@pytest.mark.slow
def test_the_staged_job_writes_the_bytes_of_a_local_run(
    remote: Asked,
    published_store: Path,
    service: FakeDataflow,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    authorize(service, tmp_path, monkeypatch)
    with start(flags(remote, service)) as process:
        out, err = process.communicate(timeout=1500)
    job_errors = (tmp_path / "job.err").read_text() if (tmp_path / "job.err").exists() else ""
    assert process.returncode == 0, f"{err[-3000:]}\n{job_errors[-3000:]}"
    assert "51 views" in out
    check_job(service, remote)
    check_pipeline(load(service.staged), remote)
    asked_by = [token for method, path, token in service.requests if path != "/token"]
    assert set(asked_by) == {"Bearer token"}
    store = BucketDirectory(str(remote.store))
    found = {
        name: store.read(name, limit=1 << 30)
        for name in store.objects()
        if name not in ("spec.json", LOCK_FILE)
    }
    expected = {
        path.relative_to(published_store).as_posix(): path.read_bytes()
        for path in published_store.rglob("*")
        if path.is_file() and path.name != "spec.json"
    }
    shards = {name for name in expected if ".array_record-" in name}
    assert {name: found[name] == expected[name] for name in shards} == dict.fromkeys(shards, True)
    assert "dataset_info.json" in found


@pytest.mark.slow
def test_a_stopped_command_cancels_its_job(remote: Asked, tmp_path: Path) -> None:
    with (
        FakeDataflow(tmp_path, runs=False) as service,
        start(flags(remote, service, "--no_auth")) as process,
    ):
        end = time.monotonic() + 900
        while service.job is None:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < end, "no job"
            time.sleep(0.1)
        time.sleep(2)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=300)
        assert process.returncode == 143, err
        assert service.state == "JOB_STATE_CANCELLED"
    assert "Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("state", "error", "code", "named"),
    [
        (
            "JOB_STATE_FAILED",
            "Workflow failed. Causes: the zone is out of nvidia-tesla-t4",
            2,
            "out of nvidia",
        ),
        (
            "JOB_STATE_FAILED",
            'Traceback (most recent call last):\n  File "worker.py"\npipeline.errors.DataError: view 7: 3 of 5',
            3,
            "view 7: 3 of 5",
        ),
        ("JOB_STATE_CANCELLED", "", 2, "CANCELLED"),
    ],
)
def test_a_job_that_fails_is_one_line(
    state: str,
    error: str,
    code: int,
    named: str,
    remote: Asked,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with FakeDataflow(tmp_path, runs=False) as service:
        service.end, service.error = state, error
        found, line = fail(flags(remote, service, "--no_auth"), capsys, main=main)
    assert found == code
    assert named in line


@pytest.mark.slow
def test_a_job_that_is_refused_is_one_line(
    remote: Asked, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeDataflow(tmp_path, refuses=(403, "Dataflow API has not been used in my-project")) as service:
        code, line = fail(flags(remote, service, "--no_auth"), capsys, main=main)
    assert code == 2
    assert "Dataflow API has not been used" in line


def test_a_bucket_for_staging_that_does_not_exist_is_refused_before_the_store_is_made(
    remote: Asked, service: FakeDataflow, capsys: pytest.CaptureFixture[str]
) -> None:
    given = flags(remote, service, "--no_auth", "--temp_location=gs://no-such-bucket/temp")
    code, line = fail(given, capsys, main=main)
    assert code == 2
    assert "gs://no-such-bucket/temp" in line
    assert BucketDirectory(str(remote.store)).objects() == {}
    assert service.job is None
