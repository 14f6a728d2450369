"""Checks that the workers of a Beam runner see the paths, and that its service answers, before anything starts."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from pipeline.errors import TryAgainError, UserError
from pipeline.flags import beam as beam_flags
from pipeline.storage.bucket import is_url

_DATAFLOW = ("DataflowRunner", "TestDataflowRunner")
_PORTABLE = ("FlinkRunner", "KafkaStreamsRunner", "PortableRunner", "SparkRunner")
_PLACES = ("store", "data_dir", "teacher")
_LOCAL_FLINK = ("[local]", "[auto]")
_DATAFLOW_HOST, _JARS_HOST = "dataflow.googleapis.com", "repo.maven.apache.org"
_CONNECT_SECONDS = 5.0
_REGION = "CLOUDSDK_COMPUTE_REGION"
# Options by which workers get this package.
_SOFTWARE = (
    "sdk_container_image",
    "worker_harness_container_image",
    "setup_file",
    "requirements_file",
    "extra_package",
)
_GCLOUD_FILE = "application_default_credentials.json"


def check(flags: argparse.Namespace, arguments: Sequence[str]) -> None:
    """Checks that a runner's workers see the given paths, and that its service answers.

    Args:
      arguments: Beam's arguments.

    Raises:
      UserError: workers on other machines would get paths of this machine, or credentials are missing.
      TryAgainError: the runner's service does not answer.
    """
    path = beam_flags.runner_path(beam_flags.runner_name(arguments))
    if not path.startswith("apache_beam."):
        return  # external runners are not checked
    name = path.rsplit(".", 1)[-1]
    options, _ = beam_flags.make_parser(path).parse_known_args(list(arguments))
    elsewhere = _elsewhere(name, options)
    _check_places(flags, name, elsewhere)
    for flag, address, what in _addresses(name, options):
        _check_answers(f"{flag}={address}", *_host_and_port(flag, address), what)
    if name in _DATAFLOW:
        _check_job(name, options)
        _check_google(name, options)
    elif name in _PORTABLE:
        _check_job_server(name, options)


def _elsewhere(name: str, options: argparse.Namespace) -> str | None:
    """The reason why workers do not see this machine's files; None if they run on this machine."""
    if name in _DATAFLOW:
        return "its workers run in Google Cloud"
    far = [f"{flag}={address}" for flag, address, _ in _addresses(name, options) if not _is_here(address)]
    if name not in _PORTABLE:
        return f"its workers run where {far[0]} is" if far else None
    kind = (options.environment_type or _environment(name, options)).upper()
    if kind == "LOOPBACK":  # in this process, wherever the job server is
        return None
    if kind == "DOCKER":
        return "its workers run in containers (--environment_type=DOCKER)"
    if kind == "EXTERNAL":
        config = options.environment_config or ""
        pool = re.search(r'"url": *"([^"]*)"', config)  # HOST:PORT, or JSON with it
        here = _is_here(pool[1] if pool else config)
        return None if here else f"its workers run where --environment_config={config} is"
    return f"its workers run where {far[0]} is" if far else None


def _environment(name: str, options: argparse.Namespace) -> str:
    """The environment type that Beam chooses for a portable runner."""
    local = {
        "FlinkRunner": (options.flink_master or "[auto]") in _LOCAL_FLINK,
        "SparkRunner": re.match(r"^local(\[.+\])?$", options.spark_master_url or "local[4]") is not None,
        "KafkaStreamsRunner": True,
    }
    return "LOOPBACK" if local.get(name) else "DOCKER"


def _check_places(flags: argparse.Namespace, name: str, elsewhere: str | None) -> None:
    given = {place: getattr(flags, place) for place in _PLACES}
    local = [
        f"--{place}={path}" for place, path in given.items() if path is not None and not is_url(path)
    ] + [f"--{place} (a path of this machine by default)" for place, path in given.items() if path is None]
    if flags.shared_filesystem and (elsewhere is None or not local):
        why = (
            f"with --runner={name}, whose workers run on this machine" if local else "if all places are URLs"
        )
        raise UserError(f"--shared_filesystem: has no effect {why}; leave it out")
    if elsewhere is not None and local and not flags.shared_filesystem:
        raise UserError(
            f"--runner={name}: {elsewhere} and do not see {', '.join(local)}; use URLs of a bucket, or pass "
            "--shared_filesystem if every worker sees these paths"
        )


def _addresses(name: str, options: argparse.Namespace) -> Iterator[tuple[str, str, str]]:
    """Yields flag, address and description of each service that a runner needs."""
    if name == "DaskRunner":
        if options.dask_client_address:
            yield "--dask_client_address", options.dask_client_address, "Dask scheduler"
        elif options.dask_scheduler_file:
            yield "--dask_scheduler_file", _scheduler(options.dask_scheduler_file), "Dask scheduler"
    elif name in _PORTABLE:
        if options.job_endpoint and options.job_endpoint != "embed":
            yield "--job_endpoint", options.job_endpoint, "job server"
        if name == "FlinkRunner" and (options.flink_master or "[auto]") not in _LOCAL_FLINK:
            yield "--flink_master", options.flink_master, "Flink master"
        if name == "SparkRunner" and (options.spark_master_url or "local").startswith("spark://"):
            yield "--spark_master_url", options.spark_master_url, "Spark master"
        if name == "SparkRunner" and options.spark_rest_url:
            yield "--spark_rest_url", options.spark_rest_url, "Spark master's REST service"


def _scheduler(file: str) -> str:
    try:
        return str(json.loads(Path(file).read_text())["address"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--dask_scheduler_file={file}: expected the JSON of a Dask scheduler ({type(error).__name__}: {error})"
        ) from error


_PORTS = {"--flink_master": 8081, "--spark_master_url": 7077, "--dask_client_address": 8786}


def _host_and_port(flag: str, address: str) -> tuple[str, int]:
    """Parses `HOST:PORT`, with or without a scheme.

    Raises:
      UserError: the address has no host or no port.
    """
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        host, port = parts.hostname, parts.port or _PORTS.get(flag)
    except ValueError:
        host = port = None
    if not host or port is None:
        raise UserError(f"{flag}={address}: expected HOST:PORT")
    return host, port


def _is_here(address: str) -> bool:
    host = urlsplit(address if "://" in address else f"//{address}").hostname or ""
    return host in ("localhost", "::1", socket.gethostname()) or host.startswith("127.")


def _check_answers(given: str, host: str, port: int, what: str) -> None:
    if (why := _refusal(host, port)) is not None:
        raise TryAgainError(
            f"{given}: no {what} answers at {host}:{port} ({why}); start it or correct the flag, and rerun the same command"
        )


def _refusal(host: str, port: int) -> str | None:
    """The error of connecting to a port; None if it answers."""
    try:
        socket.create_connection((host, port), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        return error.strerror or str(error)
    return None


def _has_proxy() -> bool:
    return any(os.environ.get(name) for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"))


def _check_job_server(name: str, options: argparse.Namespace) -> None:
    """Checks that a portable runner has a job server, or can start one, which is a Java program that Beam downloads."""
    if options.job_endpoint:
        return
    if name == "PortableRunner":
        raise UserError(
            "--job_endpoint is missing: --runner=PortableRunner needs the HOST:PORT of a job server"
        )
    kind = {"FlinkRunner": "flink", "SparkRunner": "spark"}.get(name, "kafka_streams")
    jar = f"--{kind}_job_server_jar"
    other = "use a running job server with --job_endpoint=HOST:PORT"
    given = getattr(options, f"{kind}_job_server_jar", None)
    if given is not None and "://" not in given and not Path(given).exists():
        raise UserError(f"{jar}={given}: no such file")
    if shutil.which("java") is None and "JAVA_HOME" not in os.environ:
        raise UserError(
            f"--runner={name}: Java is missing, which the job server needs; install it, or {other}"
        )
    if given is not None:
        return
    cached = (
        Path("~/.apache_beam/cache/jars").expanduser().glob(f"beam-runners-{kind.replace('_', '-')}-*.jar")
    )
    if any(cached) or _has_proxy():
        return
    if (why := _refusal(_JARS_HOST, 443)) is not None:
        raise TryAgainError(
            f"--runner={name}: {_JARS_HOST} does not answer ({why}), from which Beam downloads the job server; {other}, or a local "
            f"file with {jar}=FILE, and rerun the same command"
        )


def _check_job(name: str, options: argparse.Namespace) -> None:
    """Checks that Dataflow gets what a job needs, and that it is run now."""
    if options.project is None:
        raise UserError(f"--project is missing: --runner={name} needs the ID of a Google Cloud project")
    if (
        options.region is None
        and _REGION not in os.environ
        and shutil.which("gcloud") is None  # which Beam asks for its default region
    ):
        raise UserError(f"--region is missing: --runner={name} needs a region such as us-central1")
    places = {"temp_location": options.temp_location, "staging_location": options.staging_location}
    if not any(places.values()):
        raise UserError(
            f"--temp_location is missing: --runner={name} stages the job in a gs:// directory of a bucket that exists"
        )
    for flag, place in places.items():
        if place is not None and not place.startswith("gs://"):
            raise UserError(f"--{flag}={place}: expected a gs:// URL, which Dataflow can read")
    if not any(getattr(options, flag) for flag in _SOFTWARE):
        raise UserError(
            f"--sdk_container_image is missing: workers of --runner={name} have no view-distill without it; build and push "
            "docker/precompute.Dockerfile"
        )
    for flag in ("template_location", "dry_run"):
        if value := getattr(options, flag):
            raise UserError(
                f"--{flag}={value}: cannot be used; a precompute holds the lock of its store until its job has ended: omit it"
            )


def _check_google(name: str, options: argparse.Namespace) -> None:
    endpoint = options.dataflow_endpoint or f"https://{_DATAFLOW_HOST}"
    host, port = _host_and_port("--dataflow_endpoint", endpoint if ":" in endpoint[8:] else f"{endpoint}:443")
    if not options.no_auth and not _has_google_credentials():
        raise UserError(
            f"--runner={name}: Google credentials for {host} are missing; run `gcloud auth application-default login`, or set "
            "GOOGLE_APPLICATION_CREDENTIALS to the key file of a service account"
        )
    if not _has_proxy() and (why := _refusal(host, port)) is not None:
        raise TryAgainError(
            f"--runner={name}: {host}:{port} does not answer ({why}); check the connection, and rerun the same command"
        )


def _has_google_credentials() -> bool:
    """Whether Google's libraries would find credentials, from a file or as a machine in Google Cloud.

    Raises:
      UserError: GOOGLE_APPLICATION_CREDENTIALS names a file that does not exist.
    """
    if (file := os.environ.get("GOOGLE_APPLICATION_CREDENTIALS")) is not None:
        if not Path(file).is_file():
            raise UserError(f"GOOGLE_APPLICATION_CREDENTIALS={file}: no such file")
        return True
    config = Path(os.environ.get("CLOUDSDK_CONFIG") or "~/.config/gcloud").expanduser()
    if (config / _GCLOUD_FILE).is_file():
        return True
    if any(os.environ.get(name) for name in ("GCE_METADATA_HOST", "GCE_METADATA_IP", "GAE_ENV", "K_SERVICE")):
        return True
    try:
        return Path("/sys/class/dmi/id/product_name").read_text().startswith("Google")
    except OSError:
        return False
