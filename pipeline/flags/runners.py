"""Where a Beam runner's workers run, and whether its service answers: checked before anything is started."""

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
_GCLOUD_FILE = "application_default_credentials.json"


def check(flags: argparse.Namespace, arguments: Sequence[str]) -> None:
    """Checks that a runner's workers see the paths that the flags name, and that its service can be asked.

    Args:
      flags: of the precompute.
      arguments: Beam's.

    Raises:
      UserError: workers on other machines would get paths of this one, or there are no credentials.
      TryAgainError: the runner's service does not answer.
    """
    path = beam_flags.runner_path(beam_flags.runner_name(arguments))
    if not path.startswith("apache_beam."):
        return  # somebody else's runner: nothing is known of it
    name = path.rsplit(".", 1)[-1]
    options, _ = beam_flags.make_parser(path).parse_known_args(list(arguments))
    elsewhere = _elsewhere(name, options)
    _check_places(flags, name, elsewhere)
    for flag, address, what in _addresses(name, options):
        _check_answers(f"{flag}={address}", *_host_and_port(flag, address), what)
    if name in _DATAFLOW:
        _check_google(name, options)
    elif name in _PORTABLE:
        _check_job_server(name, options)


def _elsewhere(name: str, options: argparse.Namespace) -> str | None:
    """Why the workers do not see this machine's files; None where they run on it."""
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
    """The kind of environment that Beam chooses for a portable runner."""
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
        why = f"the workers of --runner={name} run on this machine" if local else "all places are URLs"
        raise UserError(f"--shared_filesystem: no effect, {why}; leave it out")
    if elsewhere is not None and local and not flags.shared_filesystem:
        raise UserError(
            f"--runner={name}: {elsewhere} and do not see {', '.join(local)}; name URLs of a bucket, or pass "
            "--shared_filesystem if every worker sees these paths"
        )


def _addresses(name: str, options: argparse.Namespace) -> Iterator[tuple[str, str, str]]:
    """(flag, address, what is there) of each service that a runner needs."""
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
            f"--dask_scheduler_file={file}: no scheduler's address there ({type(error).__name__}: {error})"
        ) from error


_PORTS = {"--flink_master": 8081, "--spark_master_url": 7077, "--dask_client_address": 8786}


def _host_and_port(flag: str, address: str) -> tuple[str, int]:
    """`HOST:PORT`, with or without a scheme.

    Raises:
      UserError: neither.
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
            f"{given}: no {what} answers at {host}:{port} ({why}); start it, or correct the flag, and run the same "
            "command again"
        )


def _refusal(host: str, port: int) -> str | None:
    """Why nothing answers at a host's port; None if something does."""
    try:
        socket.create_connection((host, port), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        return error.strerror or str(error)
    return None


def _has_proxy() -> bool:
    return any(os.environ.get(name) for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"))


def _check_job_server(name: str, options: argparse.Namespace) -> None:
    """Whether a portable runner has a job server, or can start one: a program in Java that Beam fetches."""
    if options.job_endpoint:
        return
    if name == "PortableRunner":
        raise UserError(
            "--job_endpoint is missing: --runner=PortableRunner needs the HOST:PORT of a job server"
        )
    kind = {"FlinkRunner": "flink", "SparkRunner": "spark"}.get(name, "kafka_streams")
    jar = f"--{kind}_job_server_jar"
    other = "name a job server that runs by --job_endpoint=HOST:PORT"
    given = getattr(options, f"{kind}_job_server_jar", None)
    if given is not None and "://" not in given and not Path(given).exists():
        raise UserError(f"{jar}={given}: no such file")
    if shutil.which("java") is None and "JAVA_HOME" not in os.environ:
        raise UserError(f"--runner={name}: starts a job server, which needs Java; install it, or {other}")
    if given is not None:
        return
    cached = (
        Path("~/.apache_beam/cache/jars").expanduser().glob(f"beam-runners-{kind.replace('_', '-')}-*.jar")
    )
    if any(cached) or _has_proxy():
        return
    if (why := _refusal(_JARS_HOST, 443)) is not None:
        raise TryAgainError(
            f"--runner={name}: starts a job server, which Beam fetches from {_JARS_HOST}, and that does not answer "
            f"({why}); {other}, or a file by {jar}=FILE, and run the same command again"
        )


def _check_google(name: str, options: argparse.Namespace) -> None:
    endpoint = options.dataflow_endpoint or f"https://{_DATAFLOW_HOST}"
    host, port = _host_and_port("--dataflow_endpoint", endpoint if ":" in endpoint[8:] else f"{endpoint}:443")
    if not options.no_auth and not _has_google_credentials():
        raise UserError(
            f"--runner={name}: {host} needs Google credentials, and this machine has none; run `gcloud auth "
            "application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS to the file of a service account's key"
        )
    if not _has_proxy() and (why := _refusal(host, port)) is not None:
        raise TryAgainError(
            f"--runner={name}: {host}:{port} does not answer ({why}); check the connection, and run the same command again"
        )


def _has_google_credentials() -> bool:
    """Whether the places where Google's libraries look hold credentials, or this machine is one of Google's.

    Raises:
      UserError: GOOGLE_APPLICATION_CREDENTIALS names a file that is not there.
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
