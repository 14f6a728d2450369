"""The directory of a run: `config.json`, `metrics.jsonl`, `checkpoints/` and what else it leaves."""

from __future__ import annotations

from pathlib import Path

from pipeline.cli.parser import make_directory
from pipeline.errors import UserError
from pipeline.storage.bucket import is_url
from pipeline.storage.files import TEMPORARY
from pipeline.storage.lock import LOCK_FILE
from pipeline.store.spec import SPEC_FILE
from trainer.config.run_files import COMPARISON_FILE, CONFIG_FILE, METRICS_FILE, RUNS_DIRECTORY

_FOREIGN = {SPEC_FILE, COMPARISON_FILE, RUNS_DIRECTORY}  # of stores and comparisons
# Present before a run's first checkpoint.
_EARLY = {LOCK_FILE, CONFIG_FILE, METRICS_FILE, "tensorboard"}


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
    early = LOCK_FILE in names and all(name in _EARLY or name.startswith(TEMPORARY) for name in names)
    if names & _FOREIGN or (names and not early and "checkpoints" not in names):
        raise UserError(
            f"--workdir={workdir}: not empty and not a run's directory ({min(names)}, ...); name another"
        )
    return workdir
