"""pipeline.storage.lock: one writer, and locks that end with their owner, in real processes."""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.errors.text import is_printable
from pipeline.storage.lock import LOCK_FILE, LockedError, owner_text, read_owner, writer_lock
from tests.mutations import FAST, dumps, mutations

ROOT = Path(__file__).resolve().parents[3]
HOLD = """
import sys, time
from pathlib import Path
from pipeline.storage.lock import writer_lock
with writer_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@contextlib.contextmanager
def another_writer(store: Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(store)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as owner:
        try:
            assert owner.stdout is not None
            assert owner.stdout.readline() == "held\n"
            yield owner
        finally:
            owner.kill()


def test_second_writer_is_refused_with_the_owner_and_the_lock_ends_with_it(tmp_path: Path) -> None:
    with another_writer(tmp_path) as owner:
        with pytest.raises(LockedError) as caught, writer_lock(tmp_path):
            pass
        message = str(caught.value)
        for text in (
            f"--store={tmp_path}",
            socket.gethostname(),
            f"{datetime.datetime.now(datetime.UTC).date()}",
        ):
            assert text in message
        assert f"`kill {owner.pid}`" in message
        # Being refused takes nothing from the owner.
        with pytest.raises(UserError, match=f"process {owner.pid}"), writer_lock(tmp_path):
            pass
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        with writer_lock(tmp_path):
            assert f'"pid": {os.getpid()}' in (tmp_path / LOCK_FILE).read_text()


def test_lock_is_free_after_its_block_however_it_ends(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no"), writer_lock(tmp_path):
        raise ValueError("no")
    with writer_lock(tmp_path):
        pass
    assert (tmp_path / LOCK_FILE).read_text() == ""


def test_a_lock_file_without_its_owner_is_not_a_lock(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).write_text('{"pid": 1, "host": "gone"}')
    with writer_lock(tmp_path):
        assert '"host": "gone"' not in (tmp_path / LOCK_FILE).read_text()


def test_an_owner_without_a_name_in_the_lock(tmp_path: Path) -> None:
    with another_writer(tmp_path):
        (tmp_path / LOCK_FILE).write_text("")
        with pytest.raises(UserError, match=f"fuser {tmp_path / LOCK_FILE}"), writer_lock(tmp_path):
            pass


@pytest.mark.parametrize("replaced", [False, True])
def test_a_lock_file_that_is_removed_while_it_is_locked_is_not_a_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, replaced: bool
) -> None:
    """Its last owner, or a user, removes it. A lock of the file without a name would not keep other writers out."""
    flock, calls = fcntl.flock, []

    def late(file: IO[str], operation: int) -> None:
        calls.append(operation)
        if len(calls) == 1:
            (tmp_path / LOCK_FILE).unlink()
            if replaced:
                (tmp_path / LOCK_FILE).touch()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with writer_lock(tmp_path):
        assert f'"pid": {os.getpid()}' in (tmp_path / LOCK_FILE).read_text()
        with pytest.raises(UserError, match=f"process {os.getpid()}"), writer_lock(tmp_path):
            pass


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Such as NFS without its lock daemon, or Lustre without the mount option. The kernel reports it by these codes."""

    def refuse(file: object, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(UserError, match=os.strerror(code)) as caught, writer_lock(tmp_path, flag="--workdir"):
        pass
    assert caught.value.exit_code == 2
    assert not isinstance(caught.value, LockedError)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "owner",
    [
        {"pid": "1; rm -rf ~", "host": "h", "since": "s"},
        {"pid": 7, "host": "\x1b[2Jh", "since": "s\n"},
        {"pid": 7, "host": "h" * 100_000, "since": "s"},
    ],
)
def test_text_of_a_foreign_lock_file_is_escaped_and_never_a_command(
    tmp_path: Path, owner: dict[str, object]
) -> None:
    with another_writer(tmp_path):
        (tmp_path / LOCK_FILE).write_text(json.dumps(owner))
        with pytest.raises(UserError) as caught, writer_lock(tmp_path):
            pass
    assert is_printable(str(caught.value))
    assert "rm -rf" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_lock_that_is_not_text_still_names_its_file(tmp_path: Path) -> None:
    with another_writer(tmp_path):
        for content in (b"\xff\xfe", b"[" * 100_000, b'{"pid": {}, "host": "\\u001b[2J", "since": ""}'):
            (tmp_path / LOCK_FILE).write_bytes(content)
            with pytest.raises(UserError, match="another process"), writer_lock(tmp_path):
                pass


OWNER = {"pid": 5, "host": "h", "since": "s", "command": "c", "lease": "l", "machine": "m", "renewals": 3}


@FAST
@given(st.data())
def test_any_lock_names_its_owner_or_another_process(data: st.DataObject) -> None:
    owner = read_owner(dumps(data.draw(mutations({"lock": OWNER}))["lock"]).decode())
    assert is_printable(owner_text(owner))
    assert type(owner.get("pid", 1)) is int
