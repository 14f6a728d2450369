"""Reads of an object with its version, and writes under the condition of a version: ETags in S3, generations in GCS.

fsspec supports only "create if absent", so these classes call the clients inside s3fs and gcsfs. Both raise FileExistsError if a
precondition fails.
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
    """Conditional access to the objects of one kind of bucket. A call does not retry."""

    def get(self, place: str, *, limit: int) -> tuple[bytes, str]:
        """Content and version of an object.

        Raises:
          FileNotFoundError: there is no such object.
          ValueError: the object is longer than `limit` bytes.
          IncompleteError: the object changed during the call, or the response was cut off.
        """

    def put(self, place: str, data: bytes, *, version: str | None) -> str:
        """Writes an object if it has `version`, or if it does not exist for None; returns the new version.

        Raises:
          FileExistsError: the object has another version, or does not exist although a version was expected.
          FileNotFoundError: there is no such bucket.
          UserError: the server does not implement conditional writes.
        """


def is_conflict(error: BaseException) -> bool:
    """Whether an error of s3fs or gcsfs is a failed precondition.

    s3fs recognizes only If-None-Match, by a field that some servers omit. At the end of a large upload, gcsfs hides the failed
    precondition behind an AttributeError.
    """
    return any(
        isinstance(link, FileExistsError) or (s3_error(link) or (0,))[0] == _FAILED for link in chain(error)
    )


class S3Objects:
    """Objects of S3 and compatible servers.

    Args:
      files: `s3fs.S3FileSystem`.
    """

    def __init__(self, files: Any) -> None:
        self._files = files

    def get(self, place: str, *, limit: int) -> tuple[bytes, str]:
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
                raise IncompleteError("the object changed during the read") from error
            raise
        if len(data) != info["size"]:
            raise IncompleteError(f"received {len(data):,} of {info['size']:,} bytes")
        return data, str(info["ETag"])

    def put(self, place: str, data: bytes, *, version: str | None) -> str:
        bucket, key, _ = self._files.split_path(place)
        condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}
        try:
            answer = self._files.call_s3("put_object", Bucket=bucket, Key=key, Body=data, **condition)
        except OSError as error:
            # For If-Match on a missing object, S3 returns 404, other servers 412.
            if is_conflict(error) or (version is not None and isinstance(error, FileNotFoundError)):
                raise FileExistsError(place) from error
            if error.errno == errno.ENOSYS:
                raise UserError(unsupported(place)) from error
            raise
        return str(answer["ETag"])


def _changed(error: OSError) -> bool:
    return is_conflict(error) or isinstance(error, FileNotFoundError)


class GcsObjects:
    """Objects of Google Cloud Storage.

    Args:
      files: `gcsfs.GCSFileSystem`.
    """

    def __init__(self, files: Any) -> None:
        self._files = files

    def get(self, place: str, *, limit: int) -> tuple[bytes, str]:
        info = self._files.info(place)
        if info["type"] != "file":
            raise FileNotFoundError(place)
        _check_size(info["size"], limit)
        try:
            _, data = self._files.call("GET", self._files.url(place), generation=info["generation"])
        except FileNotFoundError as error:
            raise IncompleteError("the object changed during the read") from error
        if len(data) != info["size"]:
            raise IncompleteError(f"received {len(data):,} of {info['size']:,} bytes")
        return data, str(info["generation"])

    def put(self, place: str, data: bytes, *, version: str | None) -> str:
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
        f"{place}: the server does not support conditional writes (If-Match and If-None-Match of PutObject), so two runs could "
        "write the store at once; write the store to a local path and copy it to the bucket when it is finished"
    )
