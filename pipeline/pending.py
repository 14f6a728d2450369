"""What a store lacks, as shard tasks, and the publishing of what was computed; without Beam."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterable
from pathlib import Path

from pipeline.buckets.directory import BucketDirectory
from pipeline.buckets.lease import check_lease
from pipeline.errors import DataError, UserError
from pipeline.options import PrecomputeOptions
from pipeline.outlet import note_name
from pipeline.store.identity import DatasetIdentity
from pipeline.store.layout import PENDING, VIEWS_SPLIT, below, split_directory
from pipeline.store.metadata import SplitManifest, load_manifest, publish_metadata
from pipeline.store.metadata_copy import MetadataCopy, naming
from pipeline.store.reader import Store
from pipeline.store.shards import MAX_SHARDS, ShardTask
from pipeline.store.spec import Spec, differences
from pipeline.worker import ShardResult

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


def pending_tasks(
    options: PrecomputeOptions, store: Path
) -> tuple[list[ShardTask], dict[str, DatasetIdentity]]:
    """Shards to be written, views last, and the data set identities of their splits.

    Args:
      options: of the precompute.
      store: directory of the store's metadata.

    Raises:
      DataError: what is published of a split is of another data set.
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


def publish_to_bucket(
    bucket: BucketDirectory,
    spec: Spec,
    results: Iterable[ShardResult],
    identities: dict[str, DatasetIdentity],
    *,
    lease: str,
) -> None:
    """`publish_results` of a store in a bucket, by way of a copy of its metadata.

    Args:
      lease: the lock under which the run writes.

    Raises:
      DataError: of `publish_results`; or a finished shard is not there as it was written.
      TryAgainError: another run has taken the store over.
    """
    results = list(results)
    check_lease(bucket, lease)
    there = bucket.objects()
    for task, info in ((result.task, result.info) for result in results):
        name = f"{below(task.split)}/{task.name}".lstrip("/")
        if (size := there[name].size if name in there else None) != info.bytes:
            raise DataError(f"{bucket.place(name)}: {size} bytes there, {info.bytes} were written")
    copy = MetadataCopy(bucket)
    with naming(copy.path, bucket.url):
        changed = publish_results(copy.path, spec, results, identities)
    for directory in changed:
        copy.publish(directory, before=functools.partial(check_lease, bucket, lease))
    bucket.remove_all(note_name(result.task) for result in results)


def publish_results(
    store: Path, spec: Spec, results: Iterable[ShardResult], identities: dict[str, DatasetIdentity]
) -> list[Path]:
    """Appends finished shards to what is published, and then forgets the notes on them; repaired ones are there.

    Args:
      store: its directory.
      spec: its spec.
      results: in any order.
      identities: `Dataset.identity()` by split.

    Returns:
      The directories whose metadata changed, in the order in which they were written.

    Raises:
      DataError: a shard before one of them is missing, or is published as another.
    """
    by_split: dict[str, list[ShardResult]] = {}
    for result in sorted(results, key=lambda r: r.task.number):
        if not result.task.sha256:
            by_split.setdefault(result.task.split, []).append(result)
    directories: dict[Path, dict[str, SplitManifest]] = {}
    for split, finished in by_split.items():
        directory = split_directory(store, split)
        if directory not in directories:
            directories[directory] = load_manifest(directory, digest=spec.digest())
        before = directories[directory].get(split)
        shards = list(before.shards) if before else []
        for result in finished:
            # What is published already, and the same, is this step run again by its runner.
            if shards[result.task.number : result.task.number + 1] not in ([], [result.info]):
                raise DataError(
                    f"{directory / result.task.name}: published already, and not as it was computed now"
                )
            if result.task.number > len(shards):
                raise DataError(
                    f"{directory / result.task.name}: finished, but only {len(shards)} shards precede it"
                )
            shards[result.task.number :] = [result.info, *shards[result.task.number + 1 :]]
        directories[directory][split] = SplitManifest(dataset=identities[split], shards=tuple(shards))
    # The store's own directory last: with its metadata the store exists.
    changed = sorted(directories, key=lambda directory: directory == store)
    for directory in changed:
        publish_metadata(directory, directories[directory], digest=spec.digest(), codec=spec.make_codec())
        shutil.rmtree(directory / PENDING, ignore_errors=True)
    return changed
