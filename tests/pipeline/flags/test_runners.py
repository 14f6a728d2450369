"""pipeline.flags.runners: paths that workers do not see, and services that do not answer, before anything is started."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import TryAgainError, UserError
from pipeline.flags.precompute import parse

DASK = "--runner=apache_beam.runners.dask.dask_runner.DaskRunner"
FLINK = "--runner=FlinkRunner"
SPARK = "--runner=SparkRunner"
PORTABLE = "--runner=PortableRunner"
DATAFLOW = (
    *("--runner=DataflowRunner", "--project=p", "--region=r", "--temp_location=gs://b/t"),
    "--sdk_container_image=i",
)
URLS = ("--store=gs://b/s", "--data_dir=gs://b/d", "--teacher=gs://b/t")


@pytest.fixture(autouse=True)
def no_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "GOOGLE_APPLICATION_CREDENTIALS",
        "GCE_METADATA_HOST",
        "K_SERVICE",
        "HTTPS_PROXY",
        "https_proxy",
        "CLOUDSDK_COMPUTE_REGION",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def places(tmp_path: Path) -> list[str]:
    (tmp_path / "data" / "d").mkdir(parents=True)
    (tmp_path / "data" / "saved_model.pb").touch()
    return [f"--store={tmp_path}/s", f"--data_dir={tmp_path}/data", f"--teacher={tmp_path}/data"]


@pytest.fixture
def port() -> Iterator[int]:
    """Of something that answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def asked(*flags: str) -> None:
    parse(["--dataset=d", *flags])


@pytest.mark.parametrize(
    "flags",
    [
        DATAFLOW,
        (FLINK, "--flink_master=flink.example:8081", "--environment_type=PROCESS"),
        (FLINK, "--flink_master=http://flink.example"),
        (SPARK, "--spark_master_url=spark://spark.example:7077"),
        (PORTABLE, "--job_endpoint=jobs.example:8099", "--environment_type=PROCESS"),
        (PORTABLE, "--job_endpoint=localhost:8099"),  # containers
        (
            PORTABLE,
            "--job_endpoint=localhost:1",
            "--environment_type=EXTERNAL",
            "--environment_config=pool.example:5",
        ),
        (DASK, "--dask_client_address=tcp://dask.example:8786"),
    ],
)
def test_paths_that_the_workers_do_not_see_are_refused(flags: tuple[str, ...], places: list[str]) -> None:
    with pytest.raises(UserError, match="--shared_filesystem") as caught:
        asked(*flags, *places)
    for place in places:
        assert place in str(caught.value)
        others = [*URLS[: places.index(place)], place, *URLS[places.index(place) + 1 :]]
        with pytest.raises(UserError, match="--shared_filesystem") as one:
            asked(*flags, *others)
        assert place in str(one.value)
        assert "gs://" not in str(one.value)
    for given in ([*places, "--shared_filesystem"], URLS):
        with pytest.raises((TryAgainError, UserError)) as later:  # the service does not answer
            asked(*flags, *given)
        assert "--shared_filesystem" not in str(later.value)


def test_the_embedded_default_is_of_this_machine() -> None:
    with pytest.raises(UserError, match=r"--data_dir.*--teacher"):
        parse([*DATAFLOW, "--store=gs://b/s"])


@pytest.mark.parametrize(
    "flags",
    [
        ("--runner=DirectRunner",),
        ("--runner=FnApiRunner", "--direct_running_mode=multi_processing"),
        (DASK,),
        (PORTABLE, "--job_endpoint=embed", "--environment_type=LOOPBACK"),
    ],
)
def test_workers_of_this_machine_see_its_paths(flags: tuple[str, ...], places: list[str]) -> None:
    asked(*flags, *places)
    with pytest.raises(UserError, match="no effect"):
        asked(*flags, *places, "--shared_filesystem")


def test_a_shared_file_system_without_paths_has_no_effect() -> None:
    with pytest.raises(UserError, match="no effect"):
        asked(*DATAFLOW, *URLS, "--shared_filesystem")


def test_services_of_this_machine_that_answer_are_taken(port: int, places: list[str], tmp_path: Path) -> None:
    asked(PORTABLE, f"--job_endpoint=localhost:{port}", "--environment_type=LOOPBACK", *places)
    asked(DASK, f"--dask_client_address=tcp://127.0.0.1:{port}", *places)
    (tmp_path / "scheduler.json").write_text(json.dumps({"address": f"tcp://127.0.0.1:{port}"}))
    asked(DASK, f"--dask_scheduler_file={tmp_path}/scheduler.json", *places)
    asked(
        FLINK,
        f"--flink_master=localhost:{port}",
        f"--job_endpoint=localhost:{port}",
        *places,
        "--environment_type=PROCESS",
    )


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ((PORTABLE, "--job_endpoint=localhost:{port}", "--environment_type=LOOPBACK"), "localhost:{port}"),
        ((FLINK, "--job_endpoint=localhost:{port}"), "localhost:{port}"),
        ((FLINK, "--flink_master=127.0.0.1:{port}", "--environment_type=LOOPBACK"), "127.0.0.1:{port}"),
        (
            (SPARK, "--spark_master_url=spark://localhost:{port}", "--environment_type=PROCESS"),
            "localhost:{port}",
        ),
        ((DASK, "--dask_client_address=tcp://localhost:{port}"), "localhost:{port}"),
        (
            (DASK, "--dask_client_address=tcp://nowhere.invalid:8786", "--shared_filesystem"),
            "nowhere.invalid:8786",
        ),
    ],
)
def test_a_service_that_does_not_answer_is_named(
    flags: tuple[str, ...], named: str, places: list[str]
) -> None:
    port = unused_port()
    begun = time.monotonic()
    with pytest.raises(TryAgainError) as caught:
        asked(*(flag.format(port=port) for flag in flags), "--flink_job_server_jar=/dev/null", *places)
    assert named.format(port=port) in str(caught.value)
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ((PORTABLE,), "--job_endpoint"),
        ((PORTABLE, "--job_endpoint=somewhere", "--environment_type=LOOPBACK"), "HOST:PORT"),
        ((DASK, "--dask_scheduler_file=nowhere.json"), "nowhere.json"),
        ((FLINK, "--flink_job_server_jar=nowhere.jar"), "nowhere.jar"),
    ],
)
def test_a_mistake_about_a_service_is_the_users(
    flags: tuple[str, ...], named: str, places: list[str]
) -> None:
    with pytest.raises(UserError, match=named) as caught:
        asked(*flags, *places, *(("--shared_filesystem",) if flags == (PORTABLE,) else ()))
    assert not isinstance(caught.value, TryAgainError)


@pytest.mark.parametrize(
    ("missing", "given", "named"),
    [
        ("--project", (), "--project"),
        ("--region", (), "--region"),
        ("--temp_location", (), "--temp_location"),
        ("--temp_location", ("--temp_location=/tmp/t",), "--temp_location=/tmp/t"),
        ("--temp_location", ("--staging_location=s3://b/t",), "--staging_location=s3://b/t"),
        ("--sdk_container_image", (), "--sdk_container_image"),
        (None, ("--template_location=gs://b/template",), "--template_location=gs://b/template"),
        (None, ("--dry_run=true",), "--dry_run=true"),
    ],
)
def test_a_dataflow_job_that_cannot_run_is_refused_before_anything_else(
    missing: str | None, given: tuple[str, ...], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")  # without gcloud, which may have a default region
    flags = [flag for flag in DATAFLOW if flag.split("=")[0] != missing]
    with pytest.raises(UserError) as caught:
        asked(*flags, *given, *URLS)
    assert str(caught.value).startswith(named)
    assert not isinstance(caught.value, TryAgainError)


@pytest.mark.parametrize(
    "flags",
    [
        ("--staging_location=gs://b/t", "--setup_file=./setup.py", "--region=r"),
        ("--temp_location=gs://b/t", "--worker_harness_container_image=i"),
    ],
)
def test_other_ways_to_stage_a_dataflow_job_are_taken(
    flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOUDSDK_COMPUTE_REGION", "us-central1")
    with pytest.raises(UserError, match="credentials"):  # the next check
        asked("--runner=dataflow", "--project=p", *flags, *URLS)


def test_dataflow_without_credentials_ends_at_once() -> None:
    begun = time.monotonic()
    with pytest.raises(UserError, match=r"dataflow\.googleapis\.com.*gcloud auth") as caught:
        asked(*DATAFLOW, *URLS)
    assert not isinstance(caught.value, TryAgainError)
    assert time.monotonic() - begun < 5


def test_credentials_that_are_named_and_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/nowhere/key.json")
    with pytest.raises(UserError, match=r"/nowhere/key\.json"):
        asked(*DATAFLOW, *URLS)


def test_dataflow_that_does_not_answer_is_named(tmp_path: Path) -> None:
    (tmp_path / "application_default_credentials.json").write_text("{}")
    endpoint = f"--dataflow_endpoint=http://127.0.0.1:{unused_port()}"
    with pytest.raises(TryAgainError, match=r"127\.0\.0\.1"):
        asked(*DATAFLOW, *URLS, endpoint)
