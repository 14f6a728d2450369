"""trainer.train: a full disk ends a run with one line and no lost checkpoint; the same command continues later."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.campaigns.exact_resume import differences
from tests.runs import arguments, checkpoint_weights, fail
from tests.small_disk import resize, small_disk
from trainer.train import main

LINE = "No space left on device"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", size=1 << 20) as path:
        yield path


def size_of(*paths: Path) -> int:
    """Bytes of files and of all files in directories."""
    files = [file for path in paths for file in ([path] if path.is_file() else path.rglob("*"))]
    return sum(file.stat().st_size for file in files if file.is_file())


@pytest.mark.slow
@pytest.mark.usefixtures("deterministic")
def test_run_continues_once_a_full_disk_has_space(
    published_store: Path, data_dir: Path, tmp_path: Path, disk: Path, capsys: pytest.CaptureFixture[str]
):
    flags = ("--deterministic", "--steps=6", "--checkpoint_every=1", "--eval_every=100", "--log_every=1")

    def asked(workdir: Path) -> list[str]:
        return arguments(published_store, workdir, data_dir, *flags)

    undisturbed = tmp_path / "undisturbed"
    assert main(asked(undisturbed)) == 0
    checkpoint = size_of(*(undisturbed / "checkpoints").glob("ckpt-6.*"))
    exports = size_of(undisturbed / "student", undisturbed / "student_best")

    # Space for two checkpoints; the third fails.
    resize(disk, size=int(2.6 * checkpoint))
    code, line = fail(asked(disk / "run"), capsys)
    assert (code, LINE in line) == (2, True), line
    assert f"{disk}/run/checkpoints/ckpt-3" in line
    assert sorted(path.stem for path in (disk / "run" / "checkpoints").glob("*.index")) == [
        "ckpt-1",
        "ckpt-2",
    ]
    assert checkpoint_weights(disk / "run")

    # Space for all checkpoints, but not for the student: only the export fails.
    resize(disk, size=size_of(undisturbed) - exports // 2)
    code, line = fail(asked(disk / "run"), capsys)
    assert (code, LINE in line) == (2, True), line
    assert f"{disk}/run/.tmp-student" in line
    assert not (disk / "run" / "result.json").exists()

    resize(disk, size=4 * size_of(undisturbed))
    assert main(asked(disk / "run")) == 0
    assert differences(disk / "run", undisturbed) == []
