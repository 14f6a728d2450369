"""A directory in a bucket: its objects listed, read and written whole, and tried again when the link fails."""

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

EXTRAS = {"s3": "s3", "gs": "gcs"}  # scheme to the extra of this project that reads it
_REMOVALS = 16  # at a time
_CONNECT_SECONDS, _SILENCE_SECONDS = (
    10.0,
    60.0,
)  # of gcsfs, which else waits for ever; s3fs has limits of its own


def is_url(place: object) -> bool:
    """Whether a place is a URL rather than a path of this machine."""
    return "://" in str(place)


def check_url(url: str) -> None:
    """Refuses what is no URL of a directory in a bucket.

    Raises:
      UserError: another scheme, or no bucket.
    """
    scheme, _, rest = url.partition("://")
    if scheme not in EXTRAS or not rest.strip("/"):
        schemes = " or ".join(f"{name}://BUCKET/DIRECTORY" for name in EXTRAS)
        raise UserError(f"{url}: expected {schemes}, or a path of this machine")


def _filesystem(scheme: str) -> Any:
    import fsspec

    options: dict[str, Any] = {"use_listings_cache": False}  # another machine writes there, too
    try:
        if scheme == "gs":
            import aiohttp

            options["requests_timeout"] = aiohttp.ClientTimeout(
                sock_connect=_CONNECT_SECONDS, sock_read=_SILENCE_SECONDS
            )
        return fsspec.filesystem(scheme, **options)
    except ImportError as error:
        raise UserError(
            f"{scheme}:// needs the extra `{EXTRAS[scheme]}`: pip install 'view-distill[{EXTRAS[scheme]}]'"
        ) from error


@dataclasses.dataclass(frozen=True)
class Object:
    """What a listing says of an object.

    Attributes:
      size: in bytes.
      version: a text that changes with its content.
    """

    size: int
    version: str


def _object(info: dict[str, Any]) -> Object:
    return Object(int(info["size"]), str(info.get("ETag") or info.get("etag")))


class BucketDirectory:
    """A directory in a bucket; names are relative to it, with `/` between their parts.

    Credentials, endpoint and region are the business of the bucket's library: its environment variables and files.

    Attributes:
      url: of the directory, without a `/` at the end.

    Raises:
      UserError: no such kind of URL, or its library is not installed.
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
        """All objects by name, or those below a directory of this one; empty where there is nothing.

        Placeholders of directories are none: consoles make such objects, of no bytes and with a `/` at the end.
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
        """What a listing says of one object.

        Raises:
          FileNotFoundError: there is none.
        """
        info = with_retries(
            f"{self.place(name)}: cannot be read", lambda: self._files.info(self.place(name), refresh=True)
        )
        return _object(info)

    def read(self, name: str, *, limit: int) -> bytes:
        """A small object's content.

        Raises:
          FileNotFoundError: there is none.
          ValueError: longer than `limit` bytes.
        """
        return self.read_version(name, limit=limit)[0]

    def read_version(self, name: str, *, limit: int) -> tuple[bytes, str]:
        """A small object's content and version, of the same moment; see `replace`.

        Raises:
          FileNotFoundError: there is none.
          ValueError: longer than `limit` bytes.
        """
        place = self.place(name)
        return with_retries(f"{place}: cannot be read", lambda: self.conditional.get(place, limit=limit))

    def write(self, name: str, data: bytes, *, before: Callable[[], None] | None = None) -> None:
        """Puts an object there, whole or not at all, over any that is there.

        Args:
          name: of the object.
          data: its content.
          before: called before each attempt; what it raises ends them.
        """
        self._put(name, lambda: self._files.pipe_file(self.place(name), data), before)

    def replace(
        self, name: str, data: bytes, *, version: str | None, before: Callable[[], None] | None = None
    ) -> str:
        """Writes a small object only over the version that is known; compare and swap.

        An attempt whose answer was lost is recognized by its content: where `data` is there, this is a success. Where
        that may be another writer's, `data` needs something of its own.

        Args:
          name: of the object.
          data: its content.
          version: that is there, of `read_version` or `replace`; None if there must be no such object.
          before: called before each attempt; what it raises ends them.

        Returns:
          The new version.

        Raises:
          FileExistsError: another version is there, or none where one was expected; nothing was written.
        """
        place = self.place(name)
        try:
            return self._put(name, lambda: self.conditional.put(place, data, version=version), before)
        except FileExistsError as error:
            conflict = error
        try:
            found, there = self.read_version(name, limit=len(data))
        except (FileNotFoundError, ValueError):  # gone, or longer
            raise conflict from None
        if found != data:
            raise conflict
        return there

    def upload(
        self, path: Path, name: str, *, create: bool = False, before: Callable[[], None] | None = None
    ) -> None:
        """`write` of a file's content.

        Args:
          path: of the file.
          name: of the object.
          create: only where there is none.
          before: see `write`.

        Raises:
          FileExistsError: there is one, and `create` wants none; it may be of an attempt whose answer was lost.
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
                f"{self.url}: {first_line(error)}; make the bucket first, or correct its name"
            ) from error

    def download(self, name: str, path: Path, *, size: int) -> None:
        """Copies an object to a file.

        Raises:
          FileNotFoundError: there is none.
        """

        def get() -> None:
            self._files.get_file(self.place(name), str(path))
            if (came := path.stat().st_size) != size:
                raise IncompleteError(f"{came:,} bytes came of {size:,}")

        with_retries(f"{self.place(name)}: cannot be read", get)

    def fetch(self, name: str, *, size: int, sha256: str, scratch: Path | None = None) -> IO[bytes]:
        """A verified copy of an object in a file that has no name, and that nothing is left of when it is closed.

        Args:
          name: of the object.
          size: in bytes.
          sha256: of its content.
          scratch: directory of whose file system the space is.

        Raises:
          FileNotFoundError: there is none.
          DataError: other bytes than those came, several times.
        """

        def get() -> IO[bytes]:
            # Before anything is taken for it: what a store says and what is there may be far apart.
            if (there := self._files.info(self.place(name), refresh=True)["size"]) != size:
                raise IncompleteError(f"{there:,} bytes are there, {size:,} in the manifest")
            file = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115
            try:
                with _naming_full_disk(scratch):
                    self._files.get_file(self.place(name), named(file))
                file.seek(0)
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                if (came := file.tell()) != size or digest != sha256:
                    raise IncompleteError(
                        f"{came:,} bytes with sha256 {digest[:16]} came, {size:,} with {sha256[:16]} in the manifest"
                    )
            except BaseException:
                file.close()
                raise
            return file

        return with_retries(f"{self.place(name)}: cannot be read", get)

    def remove(self, name: str, *, before: Callable[[], None] | None = None) -> None:
        """Removes an object if it exists.

        Args:
          name: object name.
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
    """A full disk is told by a directory: the file on it has no name."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        place = str(scratch or tempfile.gettempdir())
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), place) from error


def named(file: IO[bytes]) -> str:
    """A path by which this process can open a file that has no name."""
    return f"/proc/self/fd/{file.fileno()}"
