"""Random access to the encoded images and labels of a TFDS data set prepared as ArrayRecord.

TFDS knows where the files are, how long each is and what a record holds; the records themselves are read
here, undecoded, by index, with no group-size warning and no decoding of what is not wanted.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import hashlib
import io
import json
import re
import resource
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader

from pipeline.errors import DataError, UserError
from pipeline.errors.causes import first_line, of_the_system
from pipeline.flags.dataset import COMMAND
from pipeline.inputs.labels import UNLABELED
from pipeline.storage.bucket import is_url
from pipeline.storage.cache import DATA_CACHE_BYTES
from pipeline.storage.copies import copied_dataset
from pipeline.store.identity import DatasetIdentity
from pipeline.store.spec import MAX_CLASSES
from pipeline.views.headers import has_16_bits

_LABELS_AT_ONCE = 256  # with their images
_OTHER_FILES = 1024  # that a process has open besides its data set's
_CHANNELS = (
    None,
    0,
    1,
    3,
    4,
)  # of an image feature; 0 and None: as the file has them. An alpha channel is dropped


def _prepare_hint(name: str) -> str:
    return (
        f"prepare it with `tfds build {name} --file_format=array_record --data_dir=DIR` and pass "
        "--data_dir=DIR"
    )


@contextlib.contextmanager
def without_announcements() -> Iterator[None]:
    """TFDS's bars, in whose place is one of ours, and its lines on standard output, which name a directory aside."""
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()


def find_builder(
    name: str, data_dir: str | Path | None, *, flag: str = "--dataset"
) -> tfds.core.DatasetBuilder:
    """The TFDS builder of a data set that is prepared in any format.

    Args:
      name: `NAME[/CONFIG][:VERSION]`, as TFDS takes it.
      data_dir: TFDS's data directory; None for its default.
      flag: that gave the name.

    Raises:
      UserError: TFDS does not know the name, or it is not prepared there.
    """
    where = str(data_dir) if data_dir else tfds.core.constants.DATA_DIR
    try:
        builder = tfds.builder(name, data_dir=data_dir, try_gcs=False)
        splits = builder.info.splits
    except Exception as error:  # damaged metadata make TFDS raise anything: KeyError, ParseError, ...
        raise UserError(
            f"{flag}={name}: not found in {where} ({first_line(error)}); {_prepare_hint(name)}; images of your own: "
            f"`{COMMAND} --folder=DIR --name=NAME --data_dir=DIR`"
        ) from error
    if not splits:
        raise UserError(f"{flag}={name}: not prepared in {where}; {_prepare_hint(name)}")
    return builder


def load_builder(name: str, data_dir: str | Path | None) -> tfds.core.DatasetBuilder:
    """The TFDS builder of a data set that is prepared as ArrayRecord; see `find_builder`.

    Raises:
      UserError: there is none.
    """
    builder = find_builder(name, data_dir)
    file_format = builder.info.file_format
    if file_format is not None and file_format.value != "array_record":
        where = f" --from_data_dir={data_dir}" if data_dir else ""
        raise UserError(
            f"--dataset={name}: prepared as {file_format.value} in {builder.data_dir}, but random access needs "
            f"array_record; convert it with `{COMMAND} --from_tfds={name}{where} --data_dir=DIR` and pass --data_dir=DIR"
        )
    return builder


def image_and_label(info: tfds.core.DatasetInfo) -> tuple[str, str]:
    """Names of the image and the label feature: the supervised pair, else the only candidates.

    Raises:
      UserError: there is no such pair, or the features are of a kind that is not supported.
    """
    features, keys = info.features, info.supervised_keys
    if keys and len(keys) == 2 and all(isinstance(key, str) for key in keys):
        image, label = keys
    else:
        images = [k for k, f in features.items() if isinstance(f, tfds.features.Image)]
        labels = [k for k, f in features.items() if isinstance(f, tfds.features.ClassLabel)]
        if len(images) != 1 or len(labels) != 1:
            raise UserError(
                f"{info.full_name}: expected one image and one label feature, got images {images} and labels {labels}"
            )
        image, label = images[0], labels[0]
    if missing := [key for key in (image, label) if key not in features]:
        raise UserError(
            f"{info.full_name}: no feature {missing[0]!r:.100}, which its supervised keys name; it has "
            f"{', '.join(features)}; prepare the data set again"
        )
    if not isinstance(features[image], tfds.features.Image) or not isinstance(
        features[label], tfds.features.ClassLabel
    ):
        raise UserError(
            f"{info.full_name}: expected an image-classification data set, got features {image}: "
            f"{type(features[image]).__name__}, {label}: {type(features[label]).__name__}"
        )
    _check_image_feature(info.full_name, image, features[image])
    if (features[label].num_classes or 0) > MAX_CLASSES:  # TFDS makes a name for each
        raise UserError(
            f"{info.full_name}: label feature {label} has {features[label].num_classes} classes; expected {MAX_CLASSES:,} "
            "at most"
        )
    if (features[label].num_classes or 0) < 1:
        raise UserError(
            f"{info.full_name}: label feature {label} has no number of classes; prepare the data set again with "
            "ClassLabel(names=...) or ClassLabel(num_classes=...)"
        )
    return image, label


def _check_image_feature(name: str, key: str, feature: tfds.features.Image) -> None:
    """Refuses an image feature that the renderer would not decode to the pixels that TFDS gives.

    TFDS holds float32 as the bytes of a 4-channel PNG and uint16 in 16 bits, of which an 8-bit decoder keeps the high byte.

    Raises:
      UserError: names what is supported.
    """
    dtype, shape = np.dtype(feature.np_dtype), tuple(feature.shape)
    is_mask = isinstance(feature, tfds.features.LabeledImage)
    if dtype != np.uint8 or len(shape) != 3 or shape[2] not in _CHANNELS or is_mask:
        raise UserError(
            f"{name}: image feature {key} is {type(feature).__name__} of {dtype.name}, shape {shape}; expected Image of uint8 "
            "with shape (height, width, channels) and 1, 3, 4 or None channels, encoded as JPEG or PNG; prepare the data "
            "set again with 8-bit images"
        )


def _is_file(path: str) -> bool:
    try:
        return Path(path).is_file()
    except OSError:  # a name that is too long, by damaged metadata
        return False


@dataclasses.dataclass(frozen=True)
class _File:
    path: str
    skip: int  # records before the split's first
    first: int  # index, in the split, of the first record taken
    take: int  # records taken


class Dataset:
    """One split of a prepared data set.

    Args:
      name: `NAME[/CONFIG][:VERSION]`.
      split: such as `train` or `train[:90%]`.
      data_dir: TFDS data directory, or the URL of one, which is copied to this machine once; None for TFDS's own.
      data_cache_bytes: of such copies.

    Attributes:
      name: `NAME[/CONFIG]:VERSION`.
      split: as given, sub-splits such as `train[:90%]` included.
      num_examples: N.
      num_classes: of the label feature.
      class_names: list of `num_classes` strings.
    """

    def __init__(
        self,
        name: str,
        split: str,
        *,
        data_dir: str | Path | None = None,
        data_cache_bytes: int = DATA_CACHE_BYTES,
    ) -> None:
        place = data_dir
        if data_dir is not None and is_url(data_dir):
            place = copied_dataset(name, str(data_dir), limit=data_cache_bytes)
        builder = load_builder(name, place)
        self._info = info = builder.info
        self.name = f"{'/'.join(filter(None, [info.name, info.config_name]))}:{info.version}"
        self.data_dir = str(data_dir) if data_dir else None
        self.data_cache_bytes = data_cache_bytes
        self.path = str(builder.data_dir)
        self.split_names = sorted(info.splits)
        self._image_key, self._label_key = image_and_label(info)
        self.num_classes = int(info.features[self._label_key].num_classes)
        self.class_names = list(info.features[self._label_key].names)
        self._features_json = json.dumps(info.features.to_json(), sort_keys=True, default=str)
        self._select(split, flag="--split")

    def select(self, split: str, *, flag: str = "--split") -> Dataset:
        """Another split of the same data set, which is not opened again for it.

        Args:
          split: such as `test` or `train[800:]`.
          flag: that names it.

        Raises:
          UserError: there is no such split, or it is empty.
        """
        other = object.__new__(type(self))  # not `copy`, which would open it again
        vars(other).update(vars(self))
        other._select(split, flag=flag)
        return other

    def _select(self, split: str, *, flag: str) -> None:
        info = self._info
        try:
            split_info = info.splits[split]
            instructions = split_info.file_instructions
        except (LookupError, ValueError, AssertionError, NotImplementedError) as error:
            reason = f"{first_line(error)} " if "[" in split else ""  # of a slice
            raise UserError(
                f"{flag}={split}: {reason}{info.full_name} has splits {', '.join(self.split_names)}"
            ) from error
        self.split = split
        self.num_examples = int(split_info.num_examples)
        if not self.num_examples:
            raise UserError(f"{flag}={split}: {self.name} in {self.path} has no examples there")
        self._files: list[_File] = []
        first = 0
        for instruction in instructions:
            self._files.append(
                _File(str(instruction.filename), instruction.skip, first, int(instruction.take))
            )
            first += instruction.take
        _allow_open_files(len(self._files) + _OTHER_FILES)
        self._starts = [file.first for file in self._files]
        self._readers: dict[int, ArrayRecordReader] = {}
        self._lock = threading.Lock()
        self._split_info = split_info
        # TFDS knows no bytes of a sub-split such as `train[:90%]`: those of the whole splits that it names.
        named = [name for name in self.split_names if re.search(rf"\b{re.escape(name)}\b", split)]
        self._num_bytes = {name: int(info.splits[name].num_bytes) for name in named}

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.name, self.split, self.data_dir, self.data_cache_bytes)

    def identity(self) -> DatasetIdentity:
        """Name, split, N and a cheap fingerprint from TFDS's metadata; content is checked view by view."""
        facts = {
            "name": self.name,
            "split": self.split,
            "shard_lengths": [int(n) for n in self._split_info.shard_lengths],
            "num_bytes": self._num_bytes,
            "features": self._features_json,
        }
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        return DatasetIdentity(
            name=self.name, split=self.split, num_examples=self.num_examples, fingerprint=digest[:32]
        )

    def overlap(self, other: Dataset) -> int:
        """Number of this split's examples that are in another split of the same data set, too."""
        theirs: dict[str, list[_File]] = {}
        for file in other._files:
            theirs.setdefault(file.path, []).append(file)
        return sum(
            max(min(ours.skip + ours.take, file.skip + file.take) - max(ours.skip, file.skip), 0)
            for ours in self._files
            for file in theirs.get(ours.path, ())
        )

    def _reader(self, number: int) -> ArrayRecordReader:
        with self._lock:
            if number not in self._readers:
                file = self._files[number]
                if not _is_file(file.path):
                    raise UserError(f"{file.path}: no such file; {_prepare_hint(self.name)}")
                reader = ArrayRecordReader(file.path)
                if not reader.ok() or not reader.num_records():
                    raise _not_whole(reader, file.path)
                self._readers[number] = reader
            return self._readers[number]

    def _features(self, examples: np.ndarray) -> list[Any]:
        """The tf.Example feature maps of examples int64 [n], in order."""
        by_file: dict[int, list[int]] = {}
        for slot, example in enumerate(examples.tolist()):
            by_file.setdefault(bisect.bisect_right(self._starts, example) - 1, []).append(slot)
        out: list[Any] = [None] * len(examples)
        for number, slots in by_file.items():
            file = self._files[number]
            wanted = [int(examples[slot]) - file.first + file.skip for slot in slots]
            try:
                records: Sequence[bytes] = self._reader(number).read(wanted)
            except (RuntimeError, IndexError, ValueError) as error:
                raise DataError(
                    f"{file.path}: records {wanted[:3]}... cannot be read: {first_line(error)}"
                ) from error
            for slot, record in zip(slots, records, strict=True):
                out[slot] = tf.train.Example.FromString(record).features.feature
        return out

    def read(self, examples: np.ndarray) -> list[bytes]:
        """Encoded images of examples int64 [n], in 0..N-1.

        Raises:
          DataError: a file is corrupt, or holds no image or one of 16 bits per channel.
        """
        out = []
        for example, features in zip(examples, self._features(examples), strict=True):
            values = features[self._image_key].bytes_list.value
            if len(values) != 1:
                raise DataError(f"{self.path}: example {example} of {self.split} holds no image")
            if has_16_bits(values[0]):
                raise DataError(
                    f"{self.path}: example {example} of {self.split} is a PNG of 16 bits per channel behind a uint8 feature, "
                    "expected 8 bits; scale such images to 8 bits and prepare the data set again"
                )
            out.append(values[0])
        return out

    def labels(self, examples: np.ndarray) -> np.ndarray:
        """Labels of examples int64 [n]: int64 [n], in 0..C-1 or `UNLABELED`.

        A label is read with its image, so of many examples only `_LABELS_AT_ONCE` are held at a time.

        Raises:
          DataError: a file is corrupt, or holds no label or one that is no class.
        """
        labels = np.empty(len(examples), np.int64)
        for start in range(0, len(examples), _LABELS_AT_ONCE):
            some = examples[start : start + _LABELS_AT_ONCE]
            for row, features in enumerate(self._features(some)):
                values = features[self._label_key].int64_list.value
                if len(values) != 1:
                    raise DataError(f"{self.path}: example {some[row]} of {self.split} holds no label")
                labels[start + row] = values[0]
        if (wrong := (labels < UNLABELED) | (labels >= self.num_classes)).any():
            row = int(np.argmax(wrong))
            raise DataError(
                f"{self.path}: example {examples[row]} of {self.split} has label {labels[row]}, expected 0 to "
                f"{self.num_classes - 1}, or {UNLABELED} for none"
            )
        return labels


def _allow_open_files(count: int) -> None:
    """Raises this process's own limit of open files, as far as the system lets it.

    It is 1,024 by default, a data set such as ImageNet has as many, and in the order of an epoch all are read at once.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        count = min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


def _not_whole(reader: ArrayRecordReader, path: str) -> UserError | DataError:
    """Why a file cannot be used: the system refuses to open it, or it is damaged."""
    try:
        reader.close()  # raises what opening did not
    except RuntimeError as error:
        if (found := of_the_system(error)) is not None:
            return found
    return DataError(f"{path}: not a whole ArrayRecord file; prepare the data set again")


def _reopen(name: str, split: str, data_dir: str | None, data_cache_bytes: int) -> Dataset:
    return Dataset(name, split, data_dir=data_dir, data_cache_bytes=data_cache_bytes)
