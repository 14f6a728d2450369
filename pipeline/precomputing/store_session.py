"""Pre-flight checks and exclusive locking of a store on a file system or in a bucket."""

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
from pipeline.storage.files import check_links, remove_temporaries, write_text
from pipeline.storage.lease import check_lease, hold_lease
from pipeline.storage.lock import writer_lock
from pipeline.store.classes import Classes, classes_json, read_classes
from pipeline.store.layout import (
    ACCURACY_FILE,
    CLASSES_FILE,
    EVAL_DIRECTORY,
    PENDING,
    SPEC_LIMIT,
    STORE_DIRECTORIES,
    below,
    check_leftovers,
    split_directory,
)
from pipeline.store.metadata import published_lengths
from pipeline.store.metadata_copy import MetadataCopy, naming
from pipeline.store.reader import StoreReader
from pipeline.store.shards import ShardTask, estimated_bytes, parse_shard_name
from pipeline.store.spec import SPEC_FILE, Spec

_PARALLEL_REQUESTS = 16


def prepare_directory(location: str) -> None:
    """Creates the directory of a store if it is missing.

    Raises:
      UserError: the directory has other content, or it cannot be created or written.
    """
    if is_url(location):
        bucket = BucketDirectory(location)
        try:
            bucket.read(SPEC_FILE, limit=SPEC_LIMIT)
        except FileNotFoundError:
            names = list(bucket.objects())
        except ValueError:  # reported when the spec is loaded
            return
        else:
            return
    else:
        store = make_directory(Path(location), flag="`store`", replaceable=SPEC_FILE)
        if (store / SPEC_FILE).exists():
            return
        names = [entry.name for entry in store.iterdir()]
    check_leftovers(location, names)


def recorded_classes(location: str) -> Classes:
    """Classes and labels that a store has recorded; the defaults if there is no store.

    Raises:
      DataError: they are damaged.
    """
    copy = MetadataCopy(BucketDirectory(location)) if is_url(location) else None  # removed with this object
    path = Path(location) if copy is None else copy.path
    if not (path / SPEC_FILE).exists():
        return Classes()
    with naming(path, location):
        return read_classes(path, Spec.load(path))


@dataclasses.dataclass(frozen=True)
class StoreSession:
    """A store that only this process writes.

    Attributes:
      location: path or URL of the store.
      path: directory of the metadata: the store, or a copy of a bucket's metadata. Workers on this machine note their
        progress there.
      lease: lease of the lock of a store in a bucket.
      copy: copy of the metadata of a store in a bucket.
    """

    location: str
    path: Path
    lease: str | None = None
    copy: MetadataCopy | None = None

    def check(self, spec: Spec, *, repair: bool = False) -> None:
        """Compares the store's spec with `spec`, and the sizes of published shards with the manifest.

        Args:
          spec: requested spec.
          repair: whether to skip the shards, because `damaged_shards` will read them.

        Raises:
          DataError: the specs differ, a published shard is missing or has another size, or a link leads out of the store.
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

    def open_store(self) -> StoreReader:
        """Opens what is published, which may be evaluation splits without a whole epoch of views."""
        return StoreReader(self.location, in_order=False, unfinished=True)

    def check_lock(self) -> None:
        """Checks that this process still holds the lock. Only the lock of a bucket can be lost.

        Raises:
          TryAgainError: another run has taken the store over.
        """
        if self.copy is not None and self.lease is not None:
            check_lease(self.copy.bucket, self.lease)

    def write_spec(self, spec: Spec) -> None:
        """Writes the spec if the store has none. A refused run must not, so call this after all checks."""
        if not (self.path / SPEC_FILE).exists():
            if self.copy is not None:
                self._create_spec(spec.to_json().encode())
            write_text(self.path / SPEC_FILE, spec.to_json())
        (self.path / EVAL_DIRECTORY).mkdir(exist_ok=True)

    def write_classes(self, classes: Classes, spec: Spec) -> None:
        """Writes classes and labels unless the store has them. Accuracies of others are removed, so that they are measured again.

        Raises:
          TryAgainError: another run has taken the store over.
        """
        if classes == read_classes(self.path, spec):
            return
        text = classes_json(classes, spec)
        if self.copy is not None:
            bucket = BucketDirectory(self.location)
            bucket.remove(ACCURACY_FILE, before=self.check_lock)
            bucket.write(CLASSES_FILE, text.encode(), before=self.check_lock)
        (self.path / ACCURACY_FILE).unlink(missing_ok=True)
        write_text(self.path / CLASSES_FILE, text)

    def _create_spec(self, text: bytes) -> None:
        """Writes the spec into the bucket unless another run has written one.

        Raises:
          TryAgainError: another run has, or has taken the store over.
        """
        bucket = BucketDirectory(self.location)
        try:
            bucket.replace(SPEC_FILE, text, version=None, before=self.check_lock)
        except FileExistsError as error:
            raise TryAgainError(
                f"`store`={self.location}: another run has written its {SPEC_FILE} meanwhile; run the same command again"
            ) from error

    def remove_leftovers(self) -> None:
        """Removes temporary files of dead writers, and notes on published shards.

        Raises:
          TryAgainError: another run has taken the store over.
        """
        for directory in (self.path, self.path / EVAL_DIRECTORY):
            if not directory.is_dir():
                continue
            with naming(self.path, self.location):
                remove_temporaries(directory)
                remove_notes(directory)
                lengths = published_lengths(directory)
            if self.copy is not None:
                bucket = BucketDirectory(self.location)
                notes = f"{directory.relative_to(self.path).as_posix()}/{PENDING}".removeprefix("./")
                left = [name for name in bucket.objects(notes) if _is_published(Path(name).stem, lengths)]
                bucket.remove_all(left, before=self.check_lock)

    def adopt_finished(self, tasks: list[ShardTask], sink: ShardSink) -> list[ShardTask]:
        """Returns those of `tasks` whose shards an interrupted run finished; removes other files of their names.

        Without these files, every shard can be written, and none replaces another.

        Raises:
          ValueError: one of the tasks has the name of a published shard.
        """
        if not tasks:
            return []
        directories = {split_directory(self.path, task.split) for task in tasks}
        lengths = {directory: published_lengths(directory) for directory in directories}
        for task in tasks:
            if _is_published(task.name, lengths[split_directory(self.path, task.split)]):
                raise ValueError(f"{task.name} is published; it must be neither computed nor removed")
        by_name = {f"{below(task.split)}/{task.name}".lstrip("/"): task for task in tasks}
        left = [by_name[name] for name in self._file_names() if name in by_name]
        with concurrent.futures.ThreadPoolExecutor(_PARALLEL_REQUESTS) as pool:
            found = list(zip(left, pool.map(sink.finished, left), strict=True))
            list(pool.map(sink.remove, [task for task, info in found if info is None]))
        return [task for task, info in found if info is not None]

    def _file_names(self) -> list[str]:
        """Names of the files of the store, relative to it."""
        if self.copy is not None:
            return list(self.copy.bucket.objects())
        directories = [d for d in (self.path, self.path / EVAL_DIRECTORY) if d.is_dir()]
        return [path.relative_to(self.path).as_posix() for d in directories for path in d.iterdir()]


@contextlib.contextmanager
def open_session(location: str) -> Iterator[StoreSession]:
    """Holds the lock of a store within the context.

    Raises:
      UserError: another process holds the lock; names it and how to end it.
    """
    if not is_url(location):
        with writer_lock(Path(location)):
            yield StoreSession(location, Path(location))
        return
    bucket = BucketDirectory(location)
    with hold_lease(bucket) as lease:
        copy = MetadataCopy(bucket)
        yield StoreSession(location, copy.path, lease, copy)


def remove_notes(directory: Path) -> None:
    """Removes the notes on published shards of a directory; the caller holds the lock of the store."""
    pending = directory / PENDING
    if not pending.is_dir():
        return
    remove_temporaries(pending)
    lengths = published_lengths(directory)
    for path in pending.iterdir():
        if _is_published(path.stem, lengths):
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not empty: notes on shards that this run can adopt
        pending.rmdir()


def _is_published(shard: str, lengths: Mapping[str, Sequence[int]]) -> bool:
    named = parse_shard_name(shard)
    return named is not None and named[1] < len(lengths.get(named[0], ()))


def check_space(tasks: list[ShardTask], options: PrecomputeOptions) -> None:
    """Checks that the disk can hold the missing shards, or the largest one if they are uploaded to a bucket.

    Args:
      tasks: shards to be written.

    Raises:
      UserError: the disk is too small; names both sizes.
    """
    remote = is_url(options.store)
    place = tempfile.gettempdir() if remote else options.store
    codec = options.spec.make_codec()
    sizes = [estimated_bytes(task.records, codec) for task in tasks]
    needed = max(sizes) if remote else sum(sizes)
    free = shutil.disk_usage(place).free
    if needed > free:
        raise UserError(
            f"`store`={options.store}: about {needed / 1e6:,.1f} MB are needed{f' in {place}' if remote else ''}, "
            f"{free / 1e6:,.1f} MB are free there; free some space, or name another directory"
        )
