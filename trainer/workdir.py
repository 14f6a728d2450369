"""The directory of a run: `config.json`, `metrics.jsonl`, `checkpoints/` and what else it leaves."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import UserError
from pipeline.flags import make_directory
from pipeline.store.lock import LOCK_FILE
from pipeline.store.spec import SPEC_FILE


def open_workdir(text: str) -> Path:
    """Makes a run's directory, or takes that of an earlier one.

    Args:
      text: path, as `--workdir` gave it.

    Raises:
      UserError: something else is there, such as a store, or it cannot be made or written.
    """
    workdir = make_directory(Path(text), flag="--workdir")
    names = {path.name for path in workdir.iterdir()}
    if SPEC_FILE in names or (names and not names & {LOCK_FILE, "checkpoints"}):
        raise UserError(
            f"--workdir={workdir}: not empty and not a run's directory ({min(names)}, ...); name another"
        )
    return workdir
