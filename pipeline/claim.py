"""A store's directory before the work: whether it may be written, and whose it is."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from pipeline.errors import UserError
from pipeline.flags import make_directory
from pipeline.options import PrecomputeOptions
from pipeline.store.files import TEMPORARY, remove_temporaries, write_text
from pipeline.store.lock import LOCK_FILE
from pipeline.store.metadata import INFO_FILE, published_lengths
from pipeline.store.reader import STORE_DIRECTORIES, Store
from pipeline.store.shards import PENDING, RECORD_BYTES, ShardTask, parse_shard_name
from pipeline.store.spec import SPEC_FILE, Spec
from pipeline.store.untrusted import check_links
from pipeline.worker import split_directory


def open_store(path: str) -> Path:
    """Makes the store's directory; leaves the decision on its spec to `claim_store`.

    Raises:
      UserError: something else is there, or it cannot be made or written.
    """
    store = make_directory(Path(path), flag="--store")
    if not (store / SPEC_FILE).exists():
        foreign = sorted(entry.name for entry in store.iterdir() if not _is_ours(entry.name))
        if foreign:
            raise UserError(
                f"--store={store}: not a store and not empty ({foreign[0]}, ...); name another directory"
            )
    return store


def _is_ours(name: str) -> bool:
    """Whether a run that died before its spec may have left a file of this name."""
    return name == LOCK_FILE or name.startswith(f"{TEMPORARY}{SPEC_FILE}")


def check_store(store: Path, spec: Spec, *, repair: bool = False) -> None:
    """Under the lock: compares the spec that is there, and the published shards' files with the manifest.

    Args:
      store: its directory.
      spec: that is asked for.
      repair: leaves damaged shards to `damaged_tasks`.

    Raises:
      DataError: another spec, a published shard that is missing or of another size, or a link out of the store.
    """
    check_links(store, *STORE_DIRECTORIES)
    remove_leftovers(store)
    if (store / SPEC_FILE).exists():
        stored = Spec.load(store)
        stored.check_renderer()
        spec.check_same(stored, store=str(store))
        if (store / INFO_FILE).exists() and not repair:
            Store(store).check_files()


def remove_leftovers(store: Path) -> None:
    """Under the lock: removes temporaries of writers that died, and notes that are of no more use."""
    for directory in (store, split_directory(store, "eval")):
        if directory.is_dir():
            remove_temporaries(directory)
            _forget_published(directory)


def _forget_published(directory: Path) -> None:
    """Removes notes on shards that are published: the run died after its metadata, before its last step."""
    pending = directory / PENDING
    if not pending.is_dir():
        return
    remove_temporaries(pending)
    lengths = published_lengths(directory)
    for path in pending.iterdir():
        named = parse_shard_name(path.stem)
        if named is not None and named[1] < len(lengths.get(named[0], ())):
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # notes on shards that this run can adopt
        pending.rmdir()


def claim_store(store: Path, spec: Spec) -> None:
    """Writes the spec, once teacher and flags are known to work: a refused run must not claim the store."""
    if not (store / SPEC_FILE).exists():
        write_text(store / SPEC_FILE, spec.to_json())
    split_directory(store, "eval").mkdir(exist_ok=True)


def check_space(tasks: list[ShardTask], options: PrecomputeOptions) -> None:
    """Refuses a run that the disk cannot hold, before it begins."""
    needed = sum(task.records for task in tasks) * (options.spec.make_codec().bytes_per_view + RECORD_BYTES)
    free = shutil.disk_usage(options.store).free
    if needed > free:
        raise UserError(
            f"--store={options.store}: about {needed / 1e6:,.1f} MB are needed, {free / 1e6:,.1f} MB are free there"
        )
