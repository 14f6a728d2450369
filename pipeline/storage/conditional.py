"""Reads of an object together with its version, and writes only over a known version: ETags in S3, generations in GCS.

fsspec offers only "create if absent". These classes call the clients that s3fs and gcsfs hold. A precondition that
fails is a FileExistsError in both.
"""

from __future__ import annotations

import errno
from typing import Any, Protocol
from urllib.parse import quote

from pipeline.errors import UserError
from pipeline.errors.causes import chain
from pipeline.storage.retry import IncompleteError, s3_error

_FAILED = 412  # HTTP status of a failed precondition


class ConditionalObjects(Protocol):
    """The objects of one kind of bucket; one request per call, without retries of its own."""

    def get(self, place: str, *, limit: int) -> tuple[bytes, str]:
        """Content and version of an object.

        Raises:
          FileNotFoundError: no such object.
          ValueError: longer than `limit` bytes.
          IncompleteError: the object changed during the call, or the answer was cut off.
        """

    def put(self, place: str, data: bytes, *, version: str | None) -> str:
        """Writes an object if `version` is its version, or if it is absent for None; returns the new version.

        Raises:
          FileExistsError: the object has another version, or is absent where a version was expected.
          FileNotFoundError: no such bucket.
          UserError: the server does not implement conditional writes.
        """


def is_conflict(error: BaseException) -> bool:
    """Whether an error of s3fs or gcsfs is a failed precondition.

    s3fs knows only that of If-None-Match, and only by a field that some servers omit. gcsfs hides the one at the end of a
    large upload behind an AttributeError.
    """
    return any(
        isinstance(link, FileExistsError) or (s3_error(link) or (0,))[0] == _FAILED for link in chain(error)
    )


class S3Objects:
    """Of S3 and servers like it.

    Args:
      files: an `s3fs.S3FileSystem`.
    """

    def __init__(self, files: Any) -> None:
        self._files = files

    def get(self, place: str, *, limit: int) -> tuple[bytes, str]:
        """Implements `ConditionalObjects`."""
        import fsspec.asyn

        bucket, key, _ = self._files.split_path(place)
        info = self._files.info(place, refresh=True)
        if info["type"] != "file":
            raise FileNotFoundError(place)
        _check_size(info["size"], limit)

        async def get() -> bytes:
            answer = await self._files._call_s3("get_object", Bucket=bucket, Key=key, IfMatch=info["ETag"])
            try:
                data: bytes = await answer["Body"].read()
            finally:
                answer["Body"].close()
            return data

        try:
            data = fsspec.asyn.sync(self._files.loop, get)
        except OSError as error:
            if _changed(error):
                raise IncompleteError("changed while it was read") from error
            raise
        if len(data) != info["size"]:
            raise IncompleteError(f"{len(data):,} bytes came of {info['size']:,}")
        return data, str(info["ETag"])

    def put(self, place: str, data: bytes, *, version: str | None) -> str:
        """Implements `ConditionalObjects`."""
        bucket, key, _ = self._files.split_path(place)
        condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}
        try:
            answer = self._files.call_s3("put_object", Bucket=bucket, Key=key, Body=data, **condition)
        except OSError as error:
            # If-Match on an absent object is 404 in S3, 412 elsewhere.
            if is_conflict(error) or (version is not None and isinstance(error, FileNotFoundError)):
                raise FileExistsError(place) from error
            if error.errno == errno.ENOSYS:
                raise UserError(unsupported(place)) from error
            raise
        return str(answer["ETag"])


def _changed(error: OSError) -> bool:
    return is_conflict(error) or isinstance(error, FileNotFoundError)


class GcsObjects:
    """Of Google Cloud Storage.

    Args:
      files: a `gcsfs.GCSFileSystem`.
    """

    def __init__(self, files: Any) -> None:
        self._files = files

    def get(self, place: str, *, limit: int) -> tuple[bytes, str]:
        """Implements `ConditionalObjects`."""
        info = self._files.info(place)
        if info["type"] != "file":
            raise FileNotFoundError(place)
        _check_size(info["size"], limit)
        try:
            _, data = self._files.call("GET", self._files.url(place), generation=info["generation"])
        except FileNotFoundError as error:
            raise IncompleteError("changed while it was read") from error
        if len(data) != info["size"]:
            raise IncompleteError(f"{len(data):,} bytes came of {info['size']:,}")
        return data, str(info["generation"])

    def put(self, place: str, data: bytes, *, version: str | None) -> str:
        """Implements `ConditionalObjects`."""
        bucket, key, _ = self._files.split_path(place)
        answer = self._files.call(
            "POST",
            f"{self._files._location}/upload/storage/v1/b/{quote(bucket)}/o",
            uploadType="media",
            name=key,
            ifGenerationMatch=version or "0",
            headers={"Content-Type": "application/octet-stream"},
            data=data,
            json_out=True,
        )
        return str(answer["generation"])


def _check_size(size: int, limit: int) -> None:
    if size > limit:
        raise ValueError(f"longer than {limit:,} bytes")


def unsupported(place: str) -> str:
    """The message for a server that lacks conditional writes."""
    return (
        f"{place}: this server does not support conditional writes (If-Match and If-None-Match of PutObject), without which "
        "two runs could write one store; write the store to a path of this machine and copy it there when it is finished"
    )
