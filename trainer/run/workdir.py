"""The directory of a run: `config.json`, `metrics.jsonl`, `checkpoints/` and what else it leaves."""

from __future__ import annotations

from pathlib import Path

from pipeline.cli.parser import make_directory
from pipeline.errors import UserError
from pipeline.storage.bucket import is_url
from pipeline.storage.lock import LOCK_FILE
from pipeline.store.spec import SPEC_FILE


def open_workdir(text: str, *, store: str | None = None) -> Path:
    """Makes a run's directory, or takes that of an earlier one.

    Args:
      text: path, as `--workdir` gave it.
      store: path or URL of the store that is trained on.

    Raises:
      UserError: something else is there, such as a store, or it cannot be made or written; or one of the two is inside
        the other.
    """
    if store is not None and not is_url(store) and Path(store).resolve().is_relative_to(Path(text).resolve()):
        raise UserError(
            f"--workdir={text}: the store --store={store} is inside it; name a directory beside the store"
        )
    workdir = make_directory(Path(text), flag="--workdir")
    names = {path.name for path in workdir.iterdir()}
    if SPEC_FILE in names or (names and not names & {LOCK_FILE, "checkpoints"}):
        raise UserError(
            f"--workdir={workdir}: not empty and not a run's directory ({min(names)}, ...); name another"
        )
    return workdir
