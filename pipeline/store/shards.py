"""Shards: ArrayRecord files with the records of consecutive views, written atomically."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from pipeline.errors import DataError, UserError
from pipeline.errors.causes import first_line, system_error
from pipeline.storage.checked_json import build, is_whole, read_json
from pipeline.storage.files import atomic_file, sha256_of, write_text
from pipeline.store.codecs import Codec
from pipeline.store.layout import NOTE_LIMIT, PENDING
from pipeline.store.splits import file_split

# Measured with 102 float16 logits: 223 bytes per record, against 429 with groups of one, which do not compress.
WRITER_OPTIONS = "group_size:256"
# Measured with 1 to 8,192 records of 5 to 1,000 classes: bytes per record besides its logits (compressed parameters and
# fingerprints), and the size of a block. A file has two blocks besides those of its records.
_RECORD_BYTES, _BLOCK_BYTES = 24, 1 << 16
FILENAME_TEMPLATE = "{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}"
MAX_SHARDS = 99_999  # TFDS pads the index to the width of the total, at least five digits
_SHA256 = re.compile(r"[0-9a-f]{64}")


def shard_name(split: str, number: int) -> str:
    """File name of a shard. It has no total, so that a store grows without renaming files."""
    return f"{file_split(split)}.array_record-{number:05d}"


def estimated_bytes(records: int, codec: Codec) -> int:
    """Estimates the size of a shard's file in bytes, at most a few percent too small.

    Compression of the logits, which saves up to a quarter, is not known in advance.
    """
    blocks = -(-records * (codec.bytes_per_view + _RECORD_BYTES) // _BLOCK_BYTES)
    return (2 + blocks) * _BLOCK_BYTES if records else 0


def parse_shard_name(name: str) -> tuple[str, int] | None:
    """Parses a shard's file name into the split's file name and the number; None for other names."""
    split, _, number = name.partition(".array_record-")
    return (split, int(number)) if split and number.isascii() and number.isdigit() else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardTask:
    """A shard to write: views `first .. first + records - 1` of `split`, as file `number`.

    Attributes:
      split: name of the split.
      number: number of the shard in its split.
      first: index of the first view.
      records: number of views.
      sha256: required SHA-256 of the file when a published shard is repaired; None otherwise.
    """

    split: str
    number: int
    first: int
    records: int
    sha256: str | None = None

    @property
    def name(self) -> str:
        """The shard's file name."""
        return shard_name(self.split, self.number)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """A shard in the manifest.

    Attributes:
      records: number of views.
      bytes: size of the file.
      sha256: SHA-256 of the file.
      kl: mean KL(teacher || decoded) over its views at the spec's temperature, in nats.
      max_error: largest absolute logit error of the codec.
    """

    records: int
    bytes: int
    sha256: str
    kl: float
    max_error: float

    def __post_init__(self) -> None:
        measured = (self.kl, self.max_error)
        if not (
            is_whole(self.records, 1, 2**40)
            and is_whole(self.bytes, 1, 2**50)
            and _SHA256.fullmatch(self.sha256)
            and all(isinstance(number, int | float) and abs(number) < 1e300 for number in measured)
        ):
            raise ValueError(f"shard out of range: {self!s:.300}")


def open_shard(path: Path, records: int, *, place: str | None = None) -> ArrayRecordReader:
    """Opens a shard and checks its number of records.

    Args:
      records: expected number of records.
      place: path or URL of the shard for errors, if the file is a copy.

    Raises:
      DataError: the file is missing, truncated, or has another number of records.
    """
    place = place or str(path)
    if not path.is_file():
        raise DataError(f"{place}: shard file is missing, but listed in manifest.json")
    reader = ArrayRecordReader(str(path))
    usable = reader.ok()
    count = reader.num_records() if usable else 0  # also 0 for truncated and unclosed files
    if count != records:
        if usable:  # otherwise, closing raises the error of opening
            reader.close()
        raise DataError(f"{place}: {count} readable records, expected {records}; the file is damaged")
    return reader


class ShardFile:
    """A shard file that is being written under a temporary name; see `create_shard`.

    Attributes:
      size: bytes of the finished file.
      sha256: SHA-256 of the finished file; empty while it is written.
    """

    def __init__(self, temporary: Path, path: Path) -> None:
        self._temporary, self._path = temporary, path
        self._writer = ArrayRecordWriter(str(temporary), WRITER_OPTIONS)
        self.size, self.sha256 = 0, ""

    def write(self, serialized: Iterable[bytes]) -> None:
        """Appends serialized records.

        Raises:
          UserError: the disk is full or not writable.
        """
        with self._named_errors():
            for record in serialized:
                self._writer.write(record)

    def close(self) -> None:
        """Closes the file.

        Raises:
          UserError: the disk is full or not writable.
        """
        with self._named_errors():
            self._writer.close()

    def verify(self, records: int, expected: str | None) -> None:
        """Reopens the closed file, counts its records and computes its checksum.

        Raises:
          DataError: the file does not read back, or `expected` is another SHA-256.
        """
        path = self._path
        try:
            open_shard(self._temporary, records).close()
        except DataError as error:
            raise DataError(
                f"{path}: what was written does not read back ({error}); is the disk full?"
            ) from error
        size, sha256 = self._temporary.stat().st_size, sha256_of(self._temporary)
        if expected not in (None, sha256):
            raise DataError(
                f"{path}: computed again, its sha256 is {sha256[:16]} here, {expected[:16]} in the manifest; the "
                "file there is unchanged: this machine or its libraries differ from those in spec.json, so restore the file "
                "from a copy"
            )
        self.size, self.sha256 = size, sha256

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Turns ArrayRecord's errors into UserErrors that name the final path."""
        try:
            yield
        except RuntimeError as error:
            if (found := system_error(error)) is None:
                text = f"{self._path}: {first_line(error).split(';')[0]}; nothing published is lost"
            else:
                text = str(found).replace(str(self._temporary), str(self._path))
            raise UserError(text) from error


@contextlib.contextmanager
def create_shard(
    path: Path, records: int, *, expected: str | None = None, replace: bool = False
) -> Iterator[ShardFile]:
    """Writes a shard within the context: temporary name, close, reopen, count, checksum, rename.

    Args:
      records: number of records that the context has to write.
      expected: SHA-256 that the file must have, if it is known.
      replace: whether the shard replaces a file at `path`.

    Raises:
      FileExistsError: `path` has a file with other content, which stays.
      UserError: the disk is full or not writable.
      DataError: the file does not read back or has another SHA-256; a file at `path` stays.
    """
    file = None
    try:
        with atomic_file(path, replace=replace) as temporary:
            file = ShardFile(temporary, path)
            try:
                yield file
            except BaseException:
                with contextlib.suppress(UserError):  # the first error is the one to report
                    file.close()
                raise
            file.close()
            file.verify(records, expected)
    except FileExistsError:
        if file is None or not file.sha256 or sha256_of(path) != file.sha256:
            raise


def write_shard(
    path: Path, chunks: Iterable[list[bytes]], records: int, *, replace: bool = False
) -> tuple[int, str]:
    """Writes a shard from lists of serialized records; see `create_shard`.

    Returns:
      Size in bytes and SHA-256 of the file at `path`.
    """
    with create_shard(path, records, replace=replace) as file:
        for chunk in chunks:
            file.write(chunk)
    return file.size, file.sha256


class _Note(TypedDict):
    """A note on a finished shard that is not published yet."""

    spec: str
    task: ShardTask
    info: ShardInfo
    version: NotRequired[str]  # of the verified object in a bucket


def check_shard(path: Path, info: ShardInfo, *, stated: str = "in the manifest") -> None:
    """Compares the file of a shard with its size and SHA-256.

    Args:
      info: expected size and SHA-256.
      stated: source of the expectation, for errors.

    Raises:
      DataError: the file is missing, or one of them differs; shows both values.
    """
    if not path.is_file():
        raise DataError(f"{path}: shard file is missing, but listed in manifest.json")
    if (size := path.stat().st_size) != info.bytes:
        raise DataError(f"{path}: {size} bytes here, {info.bytes} {stated}; the file is damaged")
    if (digest := sha256_of(path)) != info.sha256:
        raise DataError(
            f"{path}: sha256 is {digest[:16]} here, {info.sha256[:16]} {stated}; the file is damaged"
        )


def note_path(store: Path, task: ShardTask) -> Path:
    """Path of the note on a shard.

    Args:
      store: directory of the shard.
    """
    return store / PENDING / f"{task.name}.json"


def write_note(store: Path, task: ShardTask, info: ShardInfo, *, digest: str) -> None:
    """Writes the note on a finished shard, so that a later run can adopt it if this one dies before publishing."""
    path = note_path(store, task)
    path.parent.mkdir(exist_ok=True)
    write_text(path, note_text(task, info, digest=digest))


def note_text(task: ShardTask, info: ShardInfo, *, digest: str, version: str | None = None) -> str:
    """Text of a note on a shard. `version` is the version of the verified object in a bucket."""
    note = {"spec": digest, "task": dataclasses.asdict(task), "info": dataclasses.asdict(info)}
    return json.dumps(note if version is None else note | {"version": version})


def noted_shard(note: Any, task: ShardTask, *, digest: str) -> ShardInfo | None:
    """Parses a note; returns its shard if it is exactly `task` under this spec, otherwise None."""
    try:
        found = build(_Note, note)
    except ValueError:
        return None
    same = found["spec"] == digest and found["task"] == task and found["info"].records == task.records
    return found["info"] if same else None


def finished_shard(store: Path, task: ShardTask, *, digest: str) -> ShardInfo | None:
    """Reads the note on a shard; returns the shard if it is exactly `task` under this spec, otherwise None.

    Only the size of the file is compared. `check_shard` compares its content before the shard is published.
    """
    try:
        info = noted_shard(read_json(note_path(store, task), limit=NOTE_LIMIT), task, digest=digest)
        size = (store / task.name).stat().st_size
    except (OSError, ValueError):
        return None
    return info if info is not None and size == info.bytes else None


def adopt_shard(store: Path, task: ShardTask, *, digest: str) -> ShardInfo | None:
    """Returns the finished shard of a task if the content of its file matches its note, otherwise None."""
    info = finished_shard(store, task, digest=digest)
    try:
        if info is not None:
            check_shard(store / task.name, info)
    except DataError:
        return None
    return info
