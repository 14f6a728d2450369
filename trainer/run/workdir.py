"""Directory of a run, with `config.json`, `metrics.jsonl`, `checkpoints/` and the results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.cli.parser import make_directory
from pipeline.errors import UserError
from pipeline.storage.bucket import is_url
from pipeline.storage.files import TEMPORARY
from pipeline.storage.lock import LOCK_FILE
from pipeline.store.spec import SPEC_FILE
from trainer.config.run_files import COMPARISON_FILE, CONFIG_FILE, METRICS_FILE, RUNS_DIRECTORY

_OF_OTHERS = {SPEC_FILE, COMPARISON_FILE, RUNS_DIRECTORY}  # in stores and comparisons
_EARLY = {LOCK_FILE, CONFIG_FILE, METRICS_FILE, "tensorboard"}  # before the first checkpoint


def open_workdir(text: str, *, stores: Sequence[str] = ()) -> Path:
    """Creates the directory of a run, or opens that of an earlier run.

    Raises:
      UserError: the directory contains something else, such as the store, or cannot be written.
    """
    for store in stores:
        if not is_url(store) and Path(store).resolve().is_relative_to(Path(text).resolve()):
            raise UserError(f"--workdir={text}: contains --store={store}; use a directory outside of it")
    workdir = make_directory(Path(text), flag="--workdir")
    names = {path.name for path in workdir.iterdir()}
    early = LOCK_FILE in names and all(name in _EARLY or name.startswith(TEMPORARY) for name in names)
    if names & _OF_OTHERS or (names and not early and "checkpoints" not in names):
        raise UserError(
            f"--workdir={workdir}: expected an empty directory or that of a run, but it contains {min(names)}; use another"
        )
    return workdir
