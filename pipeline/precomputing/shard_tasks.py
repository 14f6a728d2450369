"""Shard tasks: the shards that a store lacks, and the published ones that are damaged."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pipeline.errors import DataError, UserError
from pipeline.precomputing.options import PrecomputeOptions
from pipeline.store.identity import DatasetIdentity
from pipeline.store.layout import VIEWS_SPLIT, split_directory
from pipeline.store.metadata import load_manifest
from pipeline.store.reader import StoreReader
from pipeline.store.shards import MAX_SHARDS, ShardTask
from pipeline.store.spec import differences
from pipeline.store.splits import file_split

SHARD_SECONDS = 600  # longest recommended teacher time per shard: a lost worker loses its shard


def cut_shards(split: str, *, published: list[int], total: int, views_per_shard: int) -> list[ShardTask]:
    """Cuts the missing views of a split into shards, from the published end on.

    Args:
      published: lengths of the published shards.
      total: number of views that the split is to have.
      views_per_shard: largest number of views per shard; the last shard may be shorter.

    Raises:
      UserError: there would be more shards than five digits can number.
    """
    end, number = sum(published), len(published)
    count = -(-(total - end) // views_per_shard) if total > end else 0
    if number + count > MAX_SHARDS:
        least = -(-(total - end) // max(MAX_SHARDS - number, 1))
        raise UserError(
            f"`views_per_shard`={views_per_shard}: makes {number + count} shards, expected at most {MAX_SHARDS}; use "
            f"`views_per_shard`={least} or more"
        )
    return [
        ShardTask(split=split, number=number + i, first=first, records=min(views_per_shard, total - first))
        for i, first in enumerate(range(end, total, views_per_shard))
    ]


def damaged_shards(store: StoreReader) -> list[tuple[ShardTask, str]]:
    """Reads every published shard; returns a repair task and a description for each that is missing or damaged.

    A shard is a function of (spec, first view, number of views), so a lost shard can be computed again, and its checksum
    in the manifest shows whether the result is the same.
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


def missing_shards(
    options: PrecomputeOptions, store: Path
) -> tuple[list[ShardTask], dict[str, DatasetIdentity]]:
    """Returns the shards that are not published, views last, and the data set identity of each split.

    Args:
      store: directory of the store's metadata.

    Raises:
      DataError: the published part of a split comes from another data set.
      UserError: another split is published under the file name of an evaluated split.
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
        published = []
        if split in manifest:
            here, there = identities[split].to_json(), manifest[split].dataset.to_json()
            if lines := differences(here, there, sides=("here", f"in {directory}")):
                raise DataError(
                    f"{directory}: split {split} was written from other data: {'; '.join(lines)}; use the same data set, or "
                    "name another `store`"
                )
            published = [shard.records for shard in manifest[split].shards]
        else:
            _check_file_name(split, published=manifest, store=options.store)
        tasks += cut_shards(split, published=published, total=total, views_per_shard=options.views_per_shard)
    return tasks, identities


def _check_file_name(split: str, *, published: Iterable[str], store: str) -> None:
    """Refuses a split whose shards would have the file names of another published split.

    Raises:
      UserError: names both splits.
    """
    for other in published:
        if file_split(other) == file_split(split):
            raise UserError(
                f"`eval_splits`={split}: {store} stores {other} under the same file name, {file_split(split)}; use "
                f"`eval_splits`={other}, or name another slice"
            )
