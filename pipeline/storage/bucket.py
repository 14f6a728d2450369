"""A directory in a bucket: lists, reads and writes whole objects, with retries when the connection fails."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import errno
import functools
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from pipeline.errors import UserError
from pipeline.errors.causes import first_line
from pipeline.storage.conditional import ConditionalObjects, GcsObjects, S3Objects, is_conflict
from pipeline.storage.retry import IncompleteError, Result, with_retries

EXTRAS = {"s3": "s3", "gs": "gcs"}  # URL scheme to the extra of this project that supports it
_REMOVALS = 16  # removals in parallel
_CONNECT_SECONDS, _SILENCE_SECONDS = 10.0, 60.0  # gcsfs has no timeouts of its own; s3fs has


def is_url(place: object) -> bool:
    """Whether a location is a URL, not a local path."""
    return "://" in str(place)


def check_url(url: str) -> None:
    """Checks that a URL names a directory in a bucket.

    Raises:
      UserError: the scheme is not supported, or the bucket is missing.
    """
    scheme, _, rest = url.partition("://")
    if scheme not in EXTRAS or not rest.strip("/"):
        schemes = " or ".join(f"{name}://BUCKET/DIRECTORY" for name in EXTRAS)
        raise UserError(f"{url}: expected {schemes}, or a local path")


def _filesystem(scheme: str) -> Any:
    import fsspec

    options: dict[str, Any] = {"use_listings_cache": False}  # other machines write to the bucket
    try:
        if scheme == "gs":
            import aiohttp

            # Before gcsfs is imported: from 2026 on, it asks for the type of each bucket by gRPC, without a timeout, and hangs
            # where only HTTPS gets through. Hierarchical namespaces change nothing for whole objects.
            os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
            options["requests_timeout"] = aiohttp.ClientTimeout(
                sock_connect=_CONNECT_SECONDS, sock_read=_SILENCE_SECONDS
            )
        return fsspec.filesystem(scheme, **options)
    except ImportError as error:
        raise UserError(
            f"{scheme}:// needs the extra {EXTRAS[scheme]}; run pip install 'view-distill[{EXTRAS[scheme]}]'"
        ) from error


@dataclasses.dataclass(frozen=True)
class Object:
    """An object as listed.

    Attributes:
      size: size in bytes.
      version: text that changes whenever the content changes.
    """

    size: int
    version: str


def _object(info: dict[str, Any]) -> Object:
    return Object(int(info["size"]), str(info.get("ETag") or info.get("etag")))


class BucketDirectory:
    """A directory in a bucket. Names of objects are relative to it, with `/` as separator.

    s3fs or gcsfs find credentials, endpoint and region in their own environment variables and files.

    Attributes:
      url: URL of the directory, without a trailing `/`.

    Raises:
      UserError: the URL is not supported, or the library for it is not installed.
    """

    def __init__(self, url: str) -> None:
        check_url(url)
        self.url = url.rstrip("/")
        scheme = self.url.partition("://")[0]
        self._files = _filesystem(scheme)
        self.conditional: ConditionalObjects = (
            GcsObjects(self._files) if scheme == "gs" else S3Objects(self._files)
        )

    def place(self, name: str) -> str:
        """The URL of an object."""
        return f"{self.url}/{name}"

    def objects(self, below: str = "") -> dict[str, Object]:
        """All objects by name, or those in a subdirectory; empty if there are none.

        Placeholders for directories are left out. Web consoles create them as empty objects with a trailing `/`.
        """
        root = self._files._strip_protocol(self.place(below).rstrip("/"))

        def find() -> dict[str, dict[str, Any]]:
            found: dict[str, dict[str, Any]] = self._files.find(root, detail=True)
            return found

        top = self._files._strip_protocol(self.url)
        try:
            found = with_retries(f"{self.place(below)}: cannot be listed", find)
        except FileNotFoundError:
            return {}
        return {
            path[len(top) + 1 :]: _object(info)
            for path, info in found.items()
            if path != top and not path.endswith("/")
        }

    def stat(self, name: str) -> Object:
        """One object as listed.

        Raises:
          FileNotFoundError: there is no such object.
        """
        info = with_retries(
            f"{self.place(name)}: cannot be read", lambda: self._files.info(self.place(name), refresh=True)
        )
        return _object(info)

    def read(self, name: str, *, limit: int) -> bytes:
        """The content of a small object.

        Raises:
          FileNotFoundError: there is no such object.
          ValueError: the object is longer than `limit` bytes.
        """
        return self.read_version(name, limit=limit)[0]

    def read_version(self, name: str, *, limit: int) -> tuple[bytes, str]:
        """The content of a small object and the version that has this content; see `replace`.

        Raises:
          FileNotFoundError: there is no such object.
          ValueError: the object is longer than `limit` bytes.
        """
        place = self.place(name)
        return with_retries(f"{place}: cannot be read", lambda: self.conditional.get(place, limit=limit))

    def write(self, name: str, data: bytes, *, before: Callable[[], None] | None = None) -> None:
        """Writes an object, whole or not at all, and replaces an existing one.

        Args:
          before: called before each attempt; an exception that it raises ends the attempts.
        """
        self._put(name, lambda: self._files.pipe_file(self.place(name), data), before)

    def replace(
        self, name: str, data: bytes, *, version: str | None, before: Callable[[], None] | None = None
    ) -> str:
        """Writes a small object if it has a known version (compare and swap).

        An attempt whose response was lost is recognized by the content: if the object contains `data`, the write succeeded.
        If another writer could write the same content, `data` must contain something unique.

        Args:
          version: expected version, from `read_version` or `replace`; None if the object must not exist.
          before: called before each attempt; an exception that it raises ends the attempts.

        Returns:
          The new version.

        Raises:
          FileExistsError: the object has another version, or does not exist although a version was expected.
        """
        place = self.place(name)
        try:
            return self._put(name, lambda: self.conditional.put(place, data, version=version), before)
        except FileExistsError as error:
            conflict = error
        try:
            found, there = self.read_version(name, limit=len(data))
        except (FileNotFoundError, ValueError):  # removed, or longer
            raise conflict from None
        if found != data:
            raise conflict
        return there

    def upload(
        self, path: Path, name: str, *, create: bool = False, before: Callable[[], None] | None = None
    ) -> None:
        """Writes a file's content to an object.

        Args:
          path: local file.
          create: whether the object must not exist.
          before: see `write`.

        Raises:
          FileExistsError: the object exists, and `create` is set. An attempt whose response was lost may have written it.
        """
        mode = "create" if create else "overwrite"

        def put() -> None:
            try:
                self._files.put_file(str(path), self.place(name), mode=mode)
            except Exception as error:
                if create and is_conflict(error):
                    raise FileExistsError(self.place(name)) from error
                raise

        self._put(name, put, before)

    def _put(self, name: str, put: Callable[[], Result], before: Callable[[], None] | None) -> Result:
        def attempt() -> Result:
            if before is not None:
                before()
            return put()

        try:
            return with_retries(f"{self.place(name)}: cannot be written", attempt)
        except FileNotFoundError as error:
            raise UserError(
                f"{self.url}: {first_line(error)}; create the bucket, or correct its name"
            ) from error

    def download(self, name: str, path: Path, *, size: int) -> None:
        """Copies an object of a known size to a local file.

        Raises:
          FileNotFoundError: there is no such object.
          TryAgainError: the download fails repeatedly.
          DataError: the object has another size.
        """

        def get() -> None:
            self._files.get_file(self.place(name), str(path))
            if (came := path.stat().st_size) != size:
                raise IncompleteError(f"received {came:,} of {size:,} bytes")

        with_retries(f"{self.place(name)}: cannot be read", get)

    def fetch(self, name: str, *, size: int, sha256: str, scratch: Path | None = None) -> IO[bytes]:
        """A verified copy of an object in a temporary file without a name, which disappears when it is closed.

        Args:
          size: expected size in bytes.
          sha256: expected SHA-256 of the content.
          scratch: directory on the file system that holds the copy; by default the one for temporary files.

        Raises:
          FileNotFoundError: there is no such object.
          DataError: the content differs, in several attempts.
        """

        def get() -> IO[bytes]:
            # Checked before the download, since the actual size may be much larger than expected.
            if (there := self._files.info(self.place(name), refresh=True)["size"]) != size:
                raise IncompleteError(f"{there:,} bytes in the bucket, {size:,} in the manifest")
            file = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115
            try:
                with _naming_full_disk(scratch):
                    self._files.get_file(self.place(name), named(file))
                file.seek(0)
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                if (came := file.tell()) != size or digest != sha256:
                    raise IncompleteError(
                        f"received {came:,} bytes with sha256 {digest[:16]}, expected {size:,} with {sha256[:16]}"
                    )
            except BaseException:
                file.close()
                raise
            return file

        return with_retries(f"{self.place(name)}: cannot be read", get)

    def remove(self, name: str, *, before: Callable[[], None] | None = None) -> None:
        """Removes an object if it exists.

        Args:
          before: called before each attempt; an exception that it raises ends the attempts.
        """

        def remove() -> None:
            if before is not None:
                before()
            with contextlib.suppress(FileNotFoundError):
                self._files.rm_file(self.place(name))

        with_retries(f"{self.place(name)}: cannot be removed", remove)

    def remove_all(self, names: Iterable[str], *, before: Callable[[], None] | None = None) -> None:
        """Removes objects in parallel; see `remove`."""
        remove = functools.partial(self.remove, before=before)
        with concurrent.futures.ThreadPoolExecutor(_REMOVALS) as pool:
            for _ in pool.map(remove, names):  # the first exception cancels the rest
                pass


@contextlib.contextmanager
def _naming_full_disk(scratch: Path | None) -> Iterator[None]:
    """Adds the directory to the error of a full disk, since the file on it has no name."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        place = str(scratch or tempfile.gettempdir())
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), place) from error


def named(file: IO[bytes]) -> str:
    """A path by which this process can open a file without a name."""
    return f"/proc/self/fd/{file.fileno()}"
