"""Random access to the encoded images and labels of a TFDS data set prepared as ArrayRecord.

TFDS knows the files, their lengths and the features of a record. The records are read here by index and stay encoded: no
group-size warning, and only what is needed is parsed.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import json
import re
import resource
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from array_record.python.array_record_module import ArrayRecordReader

from pipeline.errors import DataError, UserError
from pipeline.errors.causes import first_line, system_error
from pipeline.inputs.builder import find_features, load_builder, prepare_hint
from pipeline.inputs.labels import UNLABELED
from pipeline.storage.bucket import is_url
from pipeline.storage.cache import DATA_CACHE_BYTES
from pipeline.storage.copies import copied_dataset
from pipeline.store.identity import DatasetIdentity
from pipeline.views.headers import has_16_bits

_LABELS_AT_ONCE = 256  # read together with their images
_OTHER_FILES = 1024  # files that a process may have open besides the data set's


def _is_file(path: str) -> bool:
    try:
        return Path(path).is_file()
    except OSError:  # too long a name, from damaged metadata
        return False


@dataclasses.dataclass(frozen=True)
class _File:
    """The part of a file that belongs to a split.

    Attributes:
      path: path of the ArrayRecord file.
      skip: number of records before the split's first.
      first: index in the split of the first record used.
      take: number of records used.
    """

    path: str
    skip: int
    first: int
    take: int


class Dataset:
    """One split of a prepared data set.

    Args:
      name: `NAME[/CONFIG][:VERSION]`.
      split: split or slice, such as `train` or `train[:90%]`.
      data_dir: TFDS data directory, or its URL, which is copied to this machine once; None for TFDS's default.
      data_cache_bytes: size limit of such copies.
      image_feature: name of the image feature; by default the supervised one, or the only one.
      label_feature: name of the label feature, or `none`; by default the supervised one, or the only one.

    Attributes:
      name: `NAME[/CONFIG]:VERSION`.
      split: split or slice, as given.
      num_examples: number of examples N.
      num_classes: number of classes of the label feature; 0 without labels.
      class_names: their names.
      split_names: names of all splits of the data set.
      data_dir: as given.
      path: directory of the data set on this machine.

    Raises:
      UserError: the data set is not prepared, its features are not supported, or there is no such split.
    """

    def __init__(
        self,
        name: str,
        split: str,
        *,
        data_dir: str | Path | None = None,
        data_cache_bytes: int = DATA_CACHE_BYTES,
        image_feature: str | None = None,
        label_feature: str | None = None,
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
        self._keys = find_features(info, image=image_feature, label=label_feature)
        self.num_classes, self.class_names = 0, []
        if self._keys.label is not None:
            label = info.features[self._keys.label]
            self.num_classes, self.class_names = int(label.num_classes), list(label.names)
        self._features_json = json.dumps(info.features.to_json(), sort_keys=True, default=str)
        self._select(split, parameter="split")

    def select(self, split: str, *, parameter: str = "split") -> Dataset:
        """Another split of the same data set, without opening the data set again.

        Args:
          split: split or slice, such as `test` or `train[800:]`.
          parameter: the parameter that gave the split, for errors.

        Raises:
          UserError: there is no such split, or it is empty.
        """
        other = object.__new__(type(self))  # not `copy`, which would open it again
        vars(other).update(vars(self))
        other._select(split, parameter=parameter)
        return other

    def _select(self, split: str, *, parameter: str) -> None:
        info = self._info
        try:
            split_info = info.splits[split]
            instructions = split_info.file_instructions
        # TFDS raises all of these for names and slices that it cannot resolve.
        except (LookupError, ValueError, AssertionError, NotImplementedError) as error:
            reason = f"{first_line(error)} " if "[" in split else ""
            raise UserError(
                f"`{parameter}`={split}: {reason}{info.full_name} has splits {', '.join(self.split_names)}"
            ) from error
        self.split = split
        self.num_examples = int(split_info.num_examples)
        if not self.num_examples:
            raise UserError(
                f"`{parameter}`={split}: empty split of {self.name} in {self.path}; name another split"
            )
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
        # TFDS has the size of whole splits only, so a slice such as `train[:90%]` counts with the splits that it names.
        named = [name for name in self.split_names if re.search(rf"\b{re.escape(name)}\b", split)]
        self._num_bytes = {name: int(info.splits[name].num_bytes) for name in named}

    def identity(self) -> DatasetIdentity:
        """Name, split, N and a fingerprint of TFDS's metadata. The images are checked view by view."""
        facts = {
            "name": self.name,
            "split": self.split,
            "shard_lengths": [int(n) for n in self._split_info.shard_lengths],
            "num_bytes": self._num_bytes,
            "features": self._features_json,
        }
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        return DatasetIdentity(
            name=self.name,
            split=self.split,
            num_examples=self.num_examples,
            fingerprint=digest[:32],
            image_feature=self._keys.named_image,
        )

    def overlap(self, other: Dataset) -> int:
        """Number of examples that this split shares with another split of the same data set."""
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
                    raise UserError(f"{file.path}: no such file; {prepare_hint(self.name)}")
                reader = ArrayRecordReader(file.path)
                if not reader.ok() or not reader.num_records():
                    raise _not_whole(reader, file.path)
                self._readers[number] = reader
            return self._readers[number]

    def _features(self, examples: np.ndarray) -> list[Any]:
        """Reads the tf.Example feature maps of examples int64 [n], in order."""
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
                    f"{file.path}: cannot read records {wanted[:3]}...: {first_line(error)}; prepare the data set again"
                ) from error
            for slot, record in zip(slots, records, strict=True):
                out[slot] = tf.train.Example.FromString(record).features.feature
        return out

    def read(self, examples: np.ndarray) -> list[bytes]:
        """Reads the encoded images of examples int64 [n], in 0..N-1.

        Raises:
          DataError: a file is corrupt, or an example has no image or one of 16 bits per channel.
        """
        out = []
        for example, features in zip(examples, self._features(examples), strict=True):
            values = features[self._keys.image].bytes_list.value
            if len(values) != 1:
                raise DataError(f"{self.path}: example {example} of {self.split} holds no image")
            if has_16_bits(values[0]):
                raise DataError(
                    f"{self.path}: example {example} of {self.split} is a PNG of 16 bits per channel in a uint8 feature, "
                    "expected 8 bits; scale such images to 8 bits and prepare the data set again"
                )
            out.append(values[0])
        return out

    def labels(self, examples: np.ndarray) -> np.ndarray:
        """Reads the labels of examples int64 [n]: int64 [n], in 0..num_classes-1 or `UNLABELED`.

        A record has image and label, so at most `_LABELS_AT_ONCE` of them are in memory at a time.

        Raises:
          DataError: a file is corrupt, or an example has no label or one outside of the classes.
        """
        labels = np.full(len(examples), UNLABELED)
        if self._keys.label is None:
            return labels
        for start in range(0, len(examples), _LABELS_AT_ONCE):
            some = examples[start : start + _LABELS_AT_ONCE]
            for row, features in enumerate(self._features(some)):
                values = features[self._keys.label].int64_list.value
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
    """Raises this process's soft limit of open files, as far as the hard limit allows.

    The default is 1,024. A data set such as ImageNet has as many files, and an epoch reads all of them at once.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        count = min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


def _not_whole(reader: ArrayRecordReader, path: str) -> UserError | DataError:
    """The error for a file that cannot be opened or is damaged."""
    try:
        reader.close()  # raises what opening did not
    except RuntimeError as error:
        if (found := system_error(error)) is not None:
            return found
    return DataError(f"{path}: not a whole ArrayRecord file; prepare the data set again")
