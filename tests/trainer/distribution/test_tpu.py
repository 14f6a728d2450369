"""trainer.distribution.tpu: every way in which there is no TPU, for real; with one, nothing could be tried."""

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
    with pytest.raises(UserError, match="--strategy=tpu: which one"):
        make_strategy("tpu")


def test_machine_without_a_tpu_is_told_so_in_one_line(published_store: Path, tmp_path: Path):
    argv = arguments(published_store, tmp_path / "run", None, "--strategy=tpu", "--tpu=local")
    done = subprocess.run(command(argv), env=environment(), capture_output=True, text=True)
    assert done.returncode == EXIT_USER_ERROR, done.stderr
    assert "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: --tpu=local: no TPU here: TPUs not found in the cluster")
    assert line.endswith("or with another --strategy")


def test_unknown_name_is_looked_up_and_refused(monkeypatch: pytest.MonkeyPatch):
    # The lookup asks Google's metadata server, which is to be found nowhere, quickly, on any machine.
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(socket, "getaddrinfo", _no_name)
    with pytest.raises(
        UserError, match=r"--tpu=nobody: cannot be looked up: .*; on the TPU's own machine, --tpu=local"
    ):
        make_strategy("tpu", tpu="nobody")


def _no_name(*_: object, **__: object) -> None:
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def test_address_where_nobody_answers_is_refused_before_tensorflow_waits_for_it():
    address = free_address()
    with pytest.raises(UserError, match=f"--tpu=grpc://{address}: nobody answers at {address}: .*refused"):
        make_strategy("tpu", tpu=f"grpc://{address}")


def test_own_address_is_let_through_and_another_machines_is_refused(monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        check_address("mine", f"127.0.0.1:{port}")
        # TEST-NET-1 (RFC 5737) is no machine's: only the connection is made elsewhere.
        monkeypatch.setattr(socket, "create_connection", lambda *_, **__: socket.socket())
        with pytest.raises(UserError, match=r"--tpu=far: its host is 192\.0\.2\.1:8470, another machine"):
            check_address("far", "192.0.2.1:8470")


def test_slice_of_several_hosts_is_refused_with_the_reason():
    both = ",".join(f"grpc://{free_address()}" for _ in range(2))
    with pytest.raises(UserError, match="a slice of 2 hosts; slices of a single host are supported"):
        make_strategy("tpu", tpu=both)
