"""A store's place before the work: whether it may be written, and whose it is; on a file system or in a bucket."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pipeline.cli.parser import make_directory
from pipeline.errors import TryAgainError, UserError
from pipeline.precomputing.options import PrecomputeOptions
from pipeline.precomputing.shard_sink import ShardSink
from pipeline.storage.bucket import BucketDirectory, is_url
from pipeline.storage.files import TEMPORARY, check_links, remove_temporaries, write_text
from pipeline.storage.lease import check_lease, hold_lease
from pipeline.storage.lock import LOCK_FILE, writer_lock
from pipeline.store.layout import (
    EVAL_DIRECTORY,
    PENDING,
    SPEC_LIMIT,
    STORE_DIRECTORIES,
    below,
    split_directory,
)
from pipeline.store.metadata import published_lengths
from pipeline.store.metadata_copy import MetadataCopy, naming
from pipeline.store.reader import Store
from pipeline.store.shards import ShardTask, estimated_bytes, parse_shard_name
from pipeline.store.spec import SPEC_FILE, Spec

_REQUESTS = 16  # at a time


def prepare_directory(location: str) -> None:
    """Makes the store's directory; leaves the decision on its spec to `StoreSession.write_spec`.

    Raises:
      UserError: something else is there, or it cannot be made or written.
    """
    if is_url(location):
        bucket = BucketDirectory(location)
        try:
            bucket.read(SPEC_FILE, limit=SPEC_LIMIT)
        except FileNotFoundError:
            names = list(bucket.objects())
        except ValueError:  # told with the other damage
            return
        else:
            return
    else:
        store = make_directory(Path(location), flag="--store", replaceable=SPEC_FILE)
        if (store / SPEC_FILE).exists():
            return
        names = [entry.name for entry in store.iterdir()]
    if foreign := sorted(name for name in names if not _is_ours(name)):
        raise UserError(
            f"--store={location}: not a store and not empty ({foreign[0]}, ...); name another directory"
        )


def _is_ours(name: str) -> bool:
    """Whether a run that died before its spec may have left a file of this name."""
    return name == LOCK_FILE or name.startswith(f"{TEMPORARY}{SPEC_FILE}")


@dataclasses.dataclass(frozen=True)
class StoreSession:
    """A store that this process alone writes.

    Attributes:
      location: path or URL.
      path: directory of its metadata, the store's own or a copy's; workers of this machine note their progress there.
      lease: of a store in a bucket: what its workers know the lock by.
    """

    location: str
    path: Path
    lease: str | None = None
    copy: MetadataCopy | None = None

    def check(self, spec: Spec, *, repair: bool = False) -> None:
        """Compares the spec that is there, and the published shards' sizes with the manifest.

        Args:
          spec: that is asked for.
          repair: leaves damaged shards to `damaged_tasks`.

        Raises:
          DataError: another spec, a published shard that is missing or of another size, or a link out of the store.
        """
        check_links(self.path, *STORE_DIRECTORIES)
        self.remove_leftovers()
        if (self.path / SPEC_FILE).exists():
            with naming(self.path, self.location):
                stored = Spec.load(self.path)
            stored.check_renderer()
            spec.check_same(stored, store=self.location)
            if not repair:
                self.open_store().check_files()

    def open_store(self) -> Store:
        """What is published, also where that is evaluation splits alone."""
        return Store(self.location, in_order=False, unfinished=True)

    def check_lock(self) -> None:
        """Checks that this process still holds the lock, which only a bucket's can lose.

        Raises:
          TryAgainError: another run has taken the store over.
        """
        if self.copy is not None and self.lease is not None:
            check_lease(self.copy.bucket, self.lease)

    def write_spec(self, spec: Spec) -> None:
        """Writes the spec, once teacher and flags are known to work: a refused run must not claim the store."""
        if not (self.path / SPEC_FILE).exists():
            if self.copy is not None:
                self._create_spec(spec.to_json().encode())
            write_text(self.path / SPEC_FILE, spec.to_json())
        (self.path / EVAL_DIRECTORY).mkdir(exist_ok=True)

    def _create_spec(self, text: bytes) -> None:
        """Puts the spec into the bucket; never over another's, whose shards would be taken for this one's."""
        bucket = BucketDirectory(self.location)
        try:
            bucket.replace(SPEC_FILE, text, version=None, before=self.check_lock)
        except FileExistsError as error:
            raise TryAgainError(
                f"--store={self.location}: another run has written its spec meanwhile; run the same command again"
            ) from error

    def remove_leftovers(self) -> None:
        """Removes what writers that died left, and of what is published the notes: those were to go in the last step."""
        for directory in (self.path, self.path / EVAL_DIRECTORY):
            if not directory.is_dir():
                continue
            with naming(self.path, self.location):
                _remove_leftovers(directory)
                lengths = published_lengths(directory)
            if self.copy is not None:
                bucket = BucketDirectory(self.location)
                notes = f"{directory.relative_to(self.path).as_posix()}/{PENDING}".removeprefix("./")
                left = [name for name in bucket.objects(notes) if _is_published(Path(name).stem, lengths)]
                bucket.remove_all(left, before=self.check_lock)

    def take_over(self, tasks: list[ShardTask], sink: ShardSink) -> list[ShardTask]:
        """The shards among `tasks` that an interrupted run finished; other files of their names are removed.

        So a shard that is written is never in another's way, and never takes another's place.

        Raises:
          ValueError: one of the tasks has the name of a published shard.
        """
        lengths = {
            below(split): published_lengths(split_directory(self.path, split))
            for split in {task.split for task in tasks}
        }
        for task in tasks:
            if _is_published(task.name, lengths[below(task.split)]):
                raise ValueError(f"{task.name} is published: it is neither computed again nor removed")
        by_name = {f"{below(task.split)}/{task.name}".lstrip("/"): task for task in tasks}
        left = [by_name[name] for name in self._file_names() if name in by_name]
        with concurrent.futures.ThreadPoolExecutor(_REQUESTS) as pool:
            found = list(zip(left, pool.map(sink.finished, left), strict=True))
            list(pool.map(sink.remove, [task for task, info in found if info is None]))
        return [task for task, info in found if info is not None]

    def _file_names(self) -> list[str]:
        """Names of the files of the store's directories, relative to it."""
        if self.copy is not None:
            return list(self.copy.bucket.objects())
        directories = [d for d in (self.path, self.path / EVAL_DIRECTORY) if d.is_dir()]
        return [path.relative_to(self.path).as_posix() for d in directories for path in d.iterdir()]


@contextlib.contextmanager
def open_session(location: str) -> Iterator[StoreSession]:
    """Holds the lock of a store.

    Raises:
      UserError: somebody else holds it; says who, since when, and how to break it.
    """
    if not is_url(location):
        with writer_lock(Path(location)):
            yield StoreSession(location, Path(location))
        return
    bucket = BucketDirectory(location)
    with hold_lease(bucket) as lease:
        copy = MetadataCopy(bucket)
        yield StoreSession(location, copy.path, lease, copy)


def _remove_leftovers(directory: Path) -> None:
    remove_temporaries(directory)
    remove_notes(directory)


def remove_notes(directory: Path) -> None:
    """Removes the notes on shards that are published; only the holder of the store's lock may."""
    pending = directory / PENDING
    if not pending.is_dir():
        return
    remove_temporaries(pending)
    lengths = published_lengths(directory)
    for path in pending.iterdir():
        if _is_published(path.stem, lengths):
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # notes on shards that this run can adopt
        pending.rmdir()


def _is_published(shard: str, lengths: Mapping[str, Sequence[int]]) -> bool:
    named = parse_shard_name(shard)
    return named is not None and named[1] < len(lengths.get(named[0], ()))


def check_space(tasks: list[ShardTask], options: PrecomputeOptions) -> None:
    """Refuses a run that the disk cannot hold, before it begins: all shards, or one on its way to a bucket.

    Args:
      tasks: shards that are still to be written.
      options: of the precompute.

    Raises:
      UserError: names both sizes.
    """
    remote = is_url(options.store)
    place = tempfile.gettempdir() if remote else options.store
    codec = options.spec.make_codec()
    sizes = [estimated_bytes(task.records, codec) for task in tasks]
    needed = max(sizes) if remote else sum(sizes)
    free = shutil.disk_usage(place).free
    if needed > free:
        raise UserError(
            f"--store={options.store}: about {needed / 1e6:,.1f} MB are needed{f' in {place}' if remote else ''}, "
            f"{free / 1e6:,.1f} MB are free there"
        )
