"""Shards: the records of consecutive views in one ArrayRecord file, written whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from pipeline.errors import DataError, UserError
from pipeline.errors.causes import first_line, system_error
from pipeline.storage.checked_json import build, is_whole, read_json
from pipeline.storage.files import atomic_file, sha256_of, write_text
from pipeline.store.codecs import Codec, Column, Encoded
from pipeline.store.layout import NOTE_LIMIT, PENDING
from pipeline.store.splits import file_split
from pipeline.views.records import ViewRecords

# Measured with 102 float16 logits: 223 bytes a record against 429 with groups of one, which compress nothing.
WRITER_OPTIONS = "group_size:256"
# Measured, of 1 to 8,192 records of 5 to 1,000 classes: a record takes about as much besides its logits (parameters and
# fingerprints, compressed), and a file is whole blocks, of which two are its own.
_RECORD_BYTES, _BLOCK_BYTES = 24, 1 << 16
FILENAME_TEMPLATE = "{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}"
MAX_SHARDS = 99_999  # TFDS pads the index to the total's width, five digits at least
_SHA256 = re.compile(r"[0-9a-f]{64}")


def shard_name(split: str, number: int) -> str:
    """File name of a shard; no total in it, so that a store grows without a rename."""
    return f"{file_split(split)}.array_record-{number:05d}"


def estimated_bytes(records: int, codec: Codec) -> int:
    """Size of the file of a shard, about; at most a few hundredths too small.

    How far the logits can be compressed is not known before they are there; it saves up to a quarter.
    """
    blocks = -(-records * (codec.bytes_per_view + _RECORD_BYTES) // _BLOCK_BYTES)
    return (2 + blocks) * _BLOCK_BYTES if records else 0


def parse_shard_name(name: str) -> tuple[str, int] | None:
    """Split, as files name it, and number from a shard's file name; None of any other name."""
    split, _, number = name.partition(".array_record-")
    return (split, int(number)) if split and number.isascii() and number.isdigit() else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardTask:
    """A shard to be written: views `first .. first + records - 1` of `split`, as file `number`.

    Attributes:
      split: that the views are of.
      number: of the shard in its split.
      first: index of its first view.
      records: number of views.
      sha256: that the file must have, where it is to be a published shard again; else None.
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
    """What the manifest says of a shard.

    Attributes:
      records: number of views.
      bytes: size of the file.
      sha256: of the file.
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
            raise ValueError(f"impossible shard: {self!s:.300}")


def record_features(codec: Codec) -> tfds.features.FeaturesDict:
    """The TFDS features of a record; `label` is not stored, the data set has it."""
    return tfds.features.FeaturesDict(
        {
            "example": np.int64,
            "box": tfds.features.Tensor(shape=(4,), dtype=np.int32),
            "flip": np.bool_,
            "mixup_ratio": np.float32,
            "crop_hash": np.uint32,
            "source_hash": np.uint32,
            **codec.features(),
        }
    )


def serialize(records: ViewRecords, encoded: Encoded) -> list[bytes]:
    """tf.Example records in TFDS's layout.

    TFDS's own serializer leaves the order of a message's map open, and shards are compared by byte.

    Args:
      records: n views with both fingerprints.
      encoded: the logits' columns, from the codec.
    """
    out = []
    for row in range(len(records.example)):
        example = tf.train.Example()
        feature = example.features.feature
        feature["example"].int64_list.value.append(int(records.example[row]))
        feature["box"].int64_list.value.extend(records.box[row].tolist())
        feature["flip"].int64_list.value.append(int(records.flip[row]))
        feature["mixup_ratio"].float_list.value.append(float(records.ratio[row]))
        feature["crop_hash"].int64_list.value.append(int(records.crop_hash[row]))
        feature["source_hash"].int64_list.value.append(int(records.source_hash[row]))
        for name, column in encoded.items():
            if column.ndim == 1:
                feature[name].float_list.value.append(float(column[row]))
            else:
                feature[name].bytes_list.value.append(column[row].tobytes())
        out.append(example.SerializeToString(deterministic=True))
    return out


_PARSE = {
    "example": tf.io.FixedLenFeature([], tf.int64),
    "box": tf.io.FixedLenFeature([4], tf.int64),
    "flip": tf.io.FixedLenFeature([], tf.int64),
    "mixup_ratio": tf.io.FixedLenFeature([], tf.float32),
    "crop_hash": tf.io.FixedLenFeature([], tf.int64),
    "source_hash": tf.io.FixedLenFeature([], tf.int64),
}


def parse(serialized: list[bytes], codec: Codec) -> ViewRecords:
    """The inverse of `serialize`, logits decoded.

    Raises:
      DataError: a record is not one of a store with this codec.
    """
    wanted = _PARSE | {
        name: tf.io.FixedLenFeature([], tf.float32 if column.size is None else tf.string)
        for name, column in codec.columns.items()
    }
    try:
        columns = {
            k: v.numpy() for k, v in tf.io.parse_example(tf.constant(serialized, tf.string), wanted).items()
        }
        logits = codec.decode(
            {name: _values(columns[name], column) for name, column in codec.columns.items()}
        )
        ratio, box = columns["mixup_ratio"], columns["box"]
        if not ((ratio >= 0) & (ratio <= 1)).all() or not ((box >= 0) & (box < 2**31)).all():
            raise ValueError("a mixup ratio or a box out of range")
    except (tf.errors.InvalidArgumentError, ValueError) as error:
        raise DataError(f"not a record of {codec.num_classes} {codec.name} logits: {error}") from error
    return ViewRecords(
        example=columns["example"],
        box=columns["box"].astype(np.int32),
        flip=columns["flip"] != 0,
        ratio=columns["mixup_ratio"],
        crop_hash=columns["crop_hash"],
        source_hash=columns["source_hash"],
        stored=np.ones(len(serialized), bool),
        logits=logits,
    )


def _values(found: np.ndarray, column: Column) -> np.ndarray:
    """A column of n records as it was parsed, to its values: [n] or [n, size]."""
    if column.size is None:
        return found
    if any(len(text) != column.bytes for text in found):
        raise ValueError(f"not {column.bytes} bytes")
    return np.frombuffer(b"".join(found), column.dtype).reshape(len(found), column.size)


def open_shard(path: Path, records: int, *, place: str | None = None) -> ArrayRecordReader:
    """A reader of a whole shard.

    Args:
      path: of the file.
      records: that it has to have.
      place: that it is a copy of, for people.

    Raises:
      DataError: missing, truncated, or another number of records.
    """
    place = place or str(path)
    if not path.is_file():
        raise DataError(f"{place}: no such shard; the metadata name it")
    reader = ArrayRecordReader(str(path))
    usable = reader.ok()
    count = reader.num_records() if usable else 0  # 0 for anything truncated or unclosed, too
    if count != records:
        if usable:  # else closing raises what opening did not
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
                f"{path}: computed again, its sha256 is {sha256[:16]} here, {expected[:16]} in the manifest; what is "
                "there stays: this machine or its libraries compute otherwise than what spec.json names, so bring the "
                "file back from a copy"
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
      path: final path.
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
    version: NotRequired[str]  # of the object in a bucket whose content was verified


def check_shard(path: Path, info: ShardInfo, *, stated: str = "in the manifest") -> None:
    """Compares the file of a shard with what is stated of it.

    Args:
      path: of the file.
      info: what is stated.
      stated: where.

    Raises:
      DataError: it is missing, or its size or SHA-256 differs; both sides are shown.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such shard; the metadata name it")
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
      task: the shard.
    """
    return store / PENDING / f"{task.name}.json"


def write_note(store: Path, task: ShardTask, info: ShardInfo, *, digest: str) -> None:
    """Notes what a shard on disk holds, so that a run that dies before its metadata loses nothing."""
    path = note_path(store, task)
    path.parent.mkdir(exist_ok=True)
    write_text(path, note_text(task, info, digest=digest))


def note_text(task: ShardTask, info: ShardInfo, *, digest: str, version: str | None = None) -> str:
    """A note on a shard; `version` is that of the object in a bucket whose content was verified."""
    note = {"spec": digest, "task": dataclasses.asdict(task), "info": dataclasses.asdict(info)}
    return json.dumps(note if version is None else note | {"version": version})


def noted_shard(note: Any, task: ShardTask, *, digest: str) -> ShardInfo | None:
    """The shard that a note is on, if it is exactly `task` under this spec, else None."""
    try:
        found = build(_Note, note)
    except ValueError:
        return None
    same = found["spec"] == digest and found["task"] == task and found["info"].records == task.records
    return found["info"] if same else None


def finished_shard(store: Path, task: ShardTask, *, digest: str) -> ShardInfo | None:
    """The finished shard that a note is on, if it is exactly `task` under this spec, else None.

    The file's size is compared, its content is not: `check_shard` does that before the shard is published.
    """
    try:
        info = noted_shard(read_json(note_path(store, task), limit=NOTE_LIMIT), task, digest=digest)
        size = (store / task.name).stat().st_size
    except (OSError, ValueError):
        return None
    return info if info is not None and size == info.bytes else None


def adopt_shard(store: Path, task: ShardTask, *, digest: str) -> ShardInfo | None:
    """`finished_shard`, if its content is the noted one, else None."""
    info = finished_shard(store, task, digest=digest)
    try:
        if info is not None:
            check_shard(store / task.name, info)
    except DataError:
        return None
    return info
