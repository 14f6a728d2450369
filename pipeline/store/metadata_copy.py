"""The metadata of a store in a bucket, copied to a directory of this machine, where the readers of metadata are."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline.errors import DataError, TryAgainError, UserError
from pipeline.storage.bucket import BucketDirectory
from pipeline.storage.files import write_bytes
from pipeline.store.layout import (
    ACCURACY_FILE,
    EVAL_DIRECTORY,
    INFO_LIMIT,
    MANIFEST_LIMIT,
    NOTE_LIMIT,
    SPEC_LIMIT,
)
from pipeline.store.metadata import FEATURES_FILE, INFO_FILE, MANIFEST_FILE
from pipeline.store.spec import SPEC_FILE

# What says what is published comes before the manifest, which may be ahead of it and never behind.
_FILES = {INFO_FILE: INFO_LIMIT, FEATURES_FILE: INFO_LIMIT, MANIFEST_FILE: MANIFEST_LIMIT}
_PUBLISHED = (MANIFEST_FILE, FEATURES_FILE, INFO_FILE)


class MetadataCopy:
    """A copy of a store's metadata, for as long as this object lives.

    Attributes:
      bucket: directory of the store.
      path: of the copy.

    Raises:
      DataError: a file is longer than any of a store.
    """

    def __init__(self, bucket: BucketDirectory) -> None:
        self.bucket = bucket
        self.path = Path(tempfile.mkdtemp(prefix="view-distill-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
        (self.path / EVAL_DIRECTORY).mkdir()
        # By name in the bucket, as of the last read or write here; None where there is no such object.
        self._versions: dict[str, str | None] = {}
        self.refresh()

    def refresh(self) -> None:
        """Copies what is there now."""
        # The store's own before those of `eval`, which are published first: what the views come with is there, then.
        limits = {SPEC_FILE: SPEC_LIMIT} | _FILES
        limits |= {f"{EVAL_DIRECTORY}/{name}": limit for name, limit in _FILES.items()}
        limits[ACCURACY_FILE] = NOTE_LIMIT
        for name, limit in limits.items():
            try:
                data, self._versions[name] = self.bucket.read_version(name, limit=limit)
            except FileNotFoundError:
                self._versions[name] = None
                (self.path / name).unlink(missing_ok=True)
                continue
            except ValueError as error:
                raise DataError(f"{self.bucket.place(name)}: not of a store ({error})") from error
            write_bytes(self.path / name, data)

    def refresh_published(self) -> bool:
        """`refresh`, if something was published since; whether it was."""
        try:
            now = self.bucket.read(INFO_FILE, limit=INFO_LIMIT)
        except (FileNotFoundError, ValueError):
            now = b""  # reported when it is read
        known = self.path / INFO_FILE
        if known.exists() and known.read_bytes() == now:
            return False
        self.refresh()
        return True

    def publish(self, directory: Path, *, before: Callable[[], None] | None = None) -> None:
        """Puts one directory's metadata of the copy into the bucket, what says that it is published last.

        Each file replaces only the version that was copied, so that a writer that slept, and whose lock was taken over in
        the meantime, replaces nothing of the new owner's.

        Args:
          directory: of the copy.
          before: see `BucketDirectory.write`.

        Raises:
          TryAgainError: another run has published since the copy was made.
        """
        below = directory.relative_to(self.path)
        for file in _PUBLISHED:
            name, data = (below / file).as_posix(), (directory / file).read_bytes()
            try:
                self._versions[name] = self.bucket.replace(
                    name, data, version=self._versions[name], before=before
                )
            except FileExistsError as error:
                raise TryAgainError(
                    f"{self.bucket.place(name)}: another run has published since this one read it; run the same command "
                    "again: what is published is kept"
                ) from error


@contextlib.contextmanager
def naming(path: Path, location: str) -> Iterator[None]:
    """Errors name where a store is, rather than where a copy of its metadata is."""
    try:
        yield
    except (UserError, DataError) as error:
        if str(path) == location or str(path) not in str(error):
            raise
        raise type(error)(str(error).replace(str(path), location)) from error
