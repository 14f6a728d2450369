"""A local copy of the metadata of a store in a bucket."""

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
    CLASSES_FILE,
    CLASSES_LIMIT,
    EVAL_DIRECTORY,
    INFO_LIMIT,
    MANIFEST_LIMIT,
    NOTE_LIMIT,
    SPEC_LIMIT,
)
from pipeline.store.metadata import FEATURES_FILE, INFO_FILE, MANIFEST_FILE
from pipeline.store.spec import SPEC_FILE

# In the order of reading: the manifest may be ahead of dataset_info.json, never behind it.
_FILES = {INFO_FILE: INFO_LIMIT, FEATURES_FILE: INFO_LIMIT, MANIFEST_FILE: MANIFEST_LIMIT}
_PUBLISHED = (MANIFEST_FILE, FEATURES_FILE, INFO_FILE)


class MetadataCopy:
    """A copy of a store's metadata in a temporary directory, which is removed with this object.

    Attributes:
      bucket: the store's directory in the bucket.
      path: directory of the copy.

    Raises:
      DataError: a file is larger than a store's can be.
    """

    def __init__(self, bucket: BucketDirectory) -> None:
        self.bucket = bucket
        self.path = Path(tempfile.mkdtemp(prefix="view-distill-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
        (self.path / EVAL_DIRECTORY).mkdir()
        # Version by name in the bucket, as of the last read or write; None if there is no such object.
        self._versions: dict[str, str | None] = {}
        self.refresh()

    def refresh(self) -> None:
        """Copies the current metadata."""
        # The store's files before those of `eval`, which are published first and so are complete for these views.
        limits = {SPEC_FILE: SPEC_LIMIT} | _FILES
        limits |= {f"{EVAL_DIRECTORY}/{name}": limit for name, limit in _FILES.items()}
        limits |= {ACCURACY_FILE: NOTE_LIMIT, CLASSES_FILE: CLASSES_LIMIT}
        for name, limit in limits.items():
            try:
                data, self._versions[name] = self.bucket.read_version(name, limit=limit)
            except FileNotFoundError:
                self._versions[name] = None
                (self.path / name).unlink(missing_ok=True)
                continue
            except ValueError as error:
                raise DataError(f"{self.bucket.place(name)}: not a store's metadata ({error})") from error
            write_bytes(self.path / name, data)

    def refresh_published(self) -> bool:
        """Copies the metadata if something was published since the last copy; returns whether it was."""
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
        """Uploads the metadata of a directory of the copy, `dataset_info.json` last.

        Each file replaces only the version that was copied. So a suspended writer whose lock was taken over cannot replace
        files of the new owner.

        Args:
          directory: directory in the copy.
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
                    f"{self.bucket.place(name)}: another run has published since this run read it; rerun the same command (published data "
                    "is safe)"
                ) from error


@contextlib.contextmanager
def naming(path: Path, location: str) -> Iterator[None]:
    """Replaces the path of the copy by the store's location in errors."""
    try:
        yield
    except (UserError, DataError) as error:
        if str(path) == location or str(path) not in str(error):
            raise
        raise type(error)(str(error).replace(str(path), location)) from error
