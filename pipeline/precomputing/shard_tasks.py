"""The shards that a store lacks, as tasks; without Beam."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pipeline.errors import DataError, UserError
from pipeline.precomputing.options import PrecomputeOptions
from pipeline.store.identity import DatasetIdentity
from pipeline.store.layout import VIEWS_SPLIT, split_directory
from pipeline.store.metadata import load_manifest
from pipeline.store.reader import Store
from pipeline.store.shards import MAX_SHARDS, ShardTask
from pipeline.store.spec import differences
from pipeline.store.splits import file_split

SHARD_SECONDS = 600  # a lost worker should not cost more than ten teacher minutes


def cut_shards(split: str, *, published: list[int], total: int, views_per_shard: int) -> list[ShardTask]:
    """The shards that are missing: cut from the published end; the last may be short.

    Args:
      split: its name.
      published: lengths of the published shards.
      total: views that there shall be.
      views_per_shard: at most.

    Raises:
      UserError: more shards than five digits can number.
    """
    end, number = sum(published), len(published)
    count = -(-(total - end) // views_per_shard) if total > end else 0
    if number + count > MAX_SHARDS:
        least = -(-(total - end) // max(MAX_SHARDS - number, 1))
        raise UserError(
            f"--views_per_shard={views_per_shard}: {number + count} shards, at most {MAX_SHARDS}; use "
            f"--views_per_shard={least} or more"
        )
    return [
        ShardTask(split=split, number=number + i, first=first, records=min(views_per_shard, total - first))
        for i, first in enumerate(range(end, total, views_per_shard))
    ]


def damaged_tasks(store: Store) -> list[tuple[ShardTask, str]]:
    """Published shards that are missing or not as the manifest says, each with what is wrong with it.

    Reads every shard. A shard is a function of (spec, first view, number of views), so what is lost can be
    computed again, and the manifest tells whether it is the same.
    """
    found = []
    for reader in store.readers():
        first = 0
        for number, info in enumerate(reader.manifest.shards):
            try:
                reader.verify(number)
            except DataError as error:
                task = ShardTask(
                    split=reader.split, number=number, first=first, records=info.records, sha256=info.sha256
                )
                found.append((task, str(error)))
            first += info.records
    return found


def _check_file_name(split: str, *, published: Iterable[str], store: str) -> None:
    """Refuses a split whose shards have the file names of another published split, and would replace them.

    Raises:
      UserError: names both splits.
    """
    for other in published:
        if file_split(other) == file_split(split):
            raise UserError(
                f"--eval_splits={split}: {store} stores {other} under the same file name, {file_split(split)}; use "
                f"--eval_splits={other}, or name another slice"
            )


def pending_tasks(
    options: PrecomputeOptions, store: Path
) -> tuple[list[ShardTask], dict[str, DatasetIdentity]]:
    """Shards to be written, views last, and the data set identities of their splits.

    Args:
      options: of the precompute.
      store: directory of the store's metadata.

    Raises:
      DataError: what is published of a split is of another data set.
      UserError: another split is published under the file name of an evaluated one.
    """
    spec = options.spec
    identities = {VIEWS_SPLIT: spec.dataset}
    totals = {}
    for split in options.eval_splits:
        dataset = options.datasets[split]
        identities[split], totals[split] = dataset.identity(), dataset.num_examples
    totals[VIEWS_SPLIT] = options.epochs * spec.num_examples
    tasks: list[ShardTask] = []
    for split, total in totals.items():
        directory = split_directory(store, split)
        manifest = load_manifest(directory, digest=spec.digest())
        if split not in manifest:
            _check_file_name(split, published=manifest, store=options.store)
        if split in manifest and (
            lines := differences(
                identities[split].to_json(),
                manifest[split].dataset.to_json(),
                sides=("here", f"in {directory}"),
            )
        ):
            raise DataError(f"{directory}: split {split} was written from other data: {'; '.join(lines)}")
        published = [s.records for s in manifest[split].shards] if split in manifest else []
        tasks += cut_shards(split, published=published, total=total, views_per_shard=options.views_per_shard)
    return tasks, identities
