"""A read-only store can be read; writing it is refused in one line."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.stores import Asked

ROOT = Path(__file__).resolve().parents[2]
CAP_DAC_OVERRIDE = 1  # root's right to ignore permission bits; linux/capability.h
PR_CAPBSET_DROP = 24  # linux/prctl.h

# One process for all commands: importing TensorFlow and Beam is most of the time.
COMMANDS = """
import sys
from pipeline import precompute, verify
from pipeline.cli.main import run_command
from trainer import train
store, precomputing, workdir, *paths = sys.argv[1:]
for name, main, arguments in (
    ("precompute", precompute.main, precomputing.split()),
    ("verify", verify.main, [f"--store={store}", *paths, "--fraction=0"]),
    ("train", train.main, [f"--store={store}", f"--workdir={workdir}", paths[0], "--student=tiny", "--steps=1",
                           "--batch_size=4", "--allow_short_run"]),
):
    try:
        run_command(main, arguments)
    except SystemExit as end:
        print(f"{name} exits {end.code}", file=sys.stderr)
"""


def obey_permission_bits() -> None:
    """Runs in a child before its program: root gives up its right to ignore permission bits."""
    if os.geteuid() == 0 and ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0):
        os._exit(77)


@pytest.fixture
def readonly(store: Path) -> Path:
    """A read-only copy of the published store without a lock file."""
    (store / ".lock").unlink(missing_ok=True)
    for path in (store, *store.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    refused = subprocess.run(["touch", store / "probe"], preexec_fn=obey_permission_bits, capture_output=True)
    if refused.returncode in (0, 77):
        pytest.skip("this user can write what permission bits forbid, and may not give that up")
    return store


def test_a_read_only_store_can_be_read_but_not_written(readonly: Path, asked: Asked, tmp_path: Path) -> None:
    precomputing = Asked(asked.data_dir, asked.teacher, readonly).flags("--epochs=4")
    before = sorted(path.name for path in readonly.rglob("*"))
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            COMMANDS,
            str(readonly),
            " ".join(precomputing),
            str(tmp_path / "run"),
            f"--data_dir={asked.data_dir}",
            f"--teacher={asked.teacher}",
        ],
        cwd=ROOT,
        preexec_fn=obey_permission_bits,
        capture_output=True,
        text=True,
    )
    lines = [
        line
        for line in done.stderr.replace("\r", "\n").splitlines()
        if line.startswith(("error", "precompute e", "verify e", "train e"))
    ]
    assert lines[0].startswith("error: ")
    assert str(readonly) in lines[0]
    assert "Permission denied" in lines[0]
    assert lines[1:] == [
        "precompute exits 2",
        "verify exits 0",
        "train exits 0",
    ], done.stderr
    assert re.search(r"views: [48] computed again", done.stdout), done.stdout
    assert (tmp_path / "run" / "result.json").exists()
    assert sorted(path.name for path in readonly.rglob("*")) == before
