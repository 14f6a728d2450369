"""trainer.distribution.tpu: errors without a TPU, which is all that can be tested without one."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

import pytest

from pipeline.errors import EXIT_USER_ERROR, UserError
from tests.runs import arguments, command, environment
from trainer.distribution.strategy import make_strategy
from trainer.distribution.tpu import check_address


def test_tpu_has_to_be_named():
    with pytest.raises(UserError, match=r"--strategy=tpu: .*--tpu"):
        make_strategy("tpu")


def test_missing_tpu_is_reported_in_one_line(published_store: Path, tmp_path: Path):
    argv = arguments(published_store, tmp_path / "run", None, "--strategy=tpu", "--tpu=local")
    done = subprocess.run(command(argv), env=environment(), capture_output=True, text=True)
    assert done.returncode == EXIT_USER_ERROR, done.stderr
    assert "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]
    assert "--tpu=local: " in line
    assert "--strategy" in line


def test_unknown_name_is_looked_up_and_refused(monkeypatch: pytest.MonkeyPatch):
    # The lookup asks Google's metadata server, which this address replaces.
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(socket, "getaddrinfo", _no_name)
    with pytest.raises(UserError, match=r"--tpu=missing: .*--tpu=local"):
        make_strategy("tpu", tpu="missing")


def _no_name(*_: object, **__: object) -> None:
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def test_address_without_an_answer_is_refused_before_tensorflow_waits():
    address = free_address()
    with pytest.raises(UserError, match=f"--tpu=grpc://{address}: .*{address}.*refused"):
        make_strategy("tpu", tpu=f"grpc://{address}")


def test_own_address_is_accepted_and_that_of_another_machine_refused(monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        check_address("mine", f"127.0.0.1:{port}")
        # TEST-NET-1 (RFC 5737) belongs to no machine, so the connection is redirected.
        monkeypatch.setattr(socket, "create_connection", lambda *_, **__: socket.socket())
        with pytest.raises(UserError, match=r"--tpu=far: .*192\.0\.2\.1:8470"):
            check_address("far", "192.0.2.1:8470")


def test_slice_of_several_hosts_is_refused_with_the_reason():
    both = ",".join(f"grpc://{free_address()}" for _ in range(2))
    with pytest.raises(UserError, match="2 hosts"):
        make_strategy("tpu", tpu=both)
