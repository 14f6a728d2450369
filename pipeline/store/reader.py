"""Reading a store: whole epochs of whole shards, verified before they are used."""

from __future__ import annotations

import collections
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from pipeline.errors import DataError, UserError, first_line
from pipeline.store.codecs import Codec
from pipeline.store.files import sha256_of
from pipeline.store.metadata import SplitManifest, load_manifest
from pipeline.store.shards import PENDING, open_shard, parse, shard_name
from pipeline.store.spec import Spec, differences
from pipeline.store.untrusted import check_links
from pipeline.views.records import ViewRecords
from pipeline.views.source import ImageSource, LoadedImages

EVAL_DIRECTORY = "eval"
STORE_DIRECTORIES = (EVAL_DIRECTORY, PENDING, f"{EVAL_DIRECTORY}/{PENDING}")
_OPEN_SHARDS = 64  # an epoch-ordered replay needs two at a time; more are for evaluation and verify


class SplitReader:
    """Random access to the records of one split; a `RecordSource`.

    A shard's size and SHA-256 are compared with the manifest when it is first opened.

    Attributes:
      num_records: views that are published.
      num_examples, num_classes: of the spec.
      manifest: the split's.
    """

    def __init__(
        self, directory: Path, split: str, manifest: SplitManifest, *, codec: Codec, num_examples: int
    ) -> None:
        self.directory = directory
        self.split = split
        self.manifest = manifest
        self.codec = codec
        self.num_examples = num_examples
        self.num_classes = codec.num_classes
        self.num_records = manifest.records
        lengths = [shard.records for shard in manifest.shards]
        self._ends = np.cumsum(lengths)
        self._starts = self._ends - lengths
        self._readers: collections.OrderedDict[int, ArrayRecordReader] = collections.OrderedDict()
        self._verified: set[int] = set()
        self._lock = threading.Lock()

    def _reader(self, number: int) -> ArrayRecordReader:
        with self._lock:
            if number not in self._readers:
                if number in self._verified:
                    path = self.directory / shard_name(self.split, number)
                    self._readers[number] = open_shard(path, self.manifest.shards[number].records)
                else:
                    self._readers[number] = self.verify(number)
                    self._verified.add(number)
                if len(self._readers) > _OPEN_SHARDS:
                    self._readers.popitem(last=False)  # closed when its last user lets go of it
            self._readers.move_to_end(number)
            return self._readers[number]

    def verify(self, number: int) -> ArrayRecordReader:
        """Opens a shard after comparing size, SHA-256 and count with the manifest.

        Raises:
          DataError: any of them differs; both sides are shown.
        """
        path = self.directory / shard_name(self.split, number)
        info = self.manifest.shards[number]
        if not path.is_file():
            raise DataError(f"{path}: no such shard; the metadata name it")
        if (size := path.stat().st_size) != info.bytes:
            raise DataError(f"{path}: {size} bytes here, {info.bytes} in the manifest; the file is damaged")
        if (digest := sha256_of(path)) != info.sha256:
            raise DataError(
                f"{path}: sha256 is {digest[:16]} here, {info.sha256[:16]} in the manifest; the file is damaged"
            )
        return open_shard(path, info.records)

    def read(self, views: np.ndarray) -> ViewRecords:
        """Records of views int64 [n], in any order, duplicates allowed.

        Raises:
          DataError: a shard is damaged.
        """
        distinct, inverse = np.unique(views, return_inverse=True)
        if len(distinct) and not 0 <= distinct[0] <= distinct[-1] < self.num_records:
            raise IndexError(f"views {distinct[0]}..{distinct[-1]} of {self.num_records}")
        shards = np.searchsorted(self._ends, distinct, side="right")
        serialized: list[bytes] = []
        for number in np.unique(shards):
            wanted = distinct[shards == number] - self._starts[number]
            try:
                serialized += self._reader(int(number)).read(wanted.tolist())
            except (RuntimeError, IndexError, ValueError) as error:
                path = self.directory / shard_name(self.split, int(number))
                first = int(distinct[shards == number][0])
                raise DataError(
                    f"{path}: records from view {first} on cannot be read: {first_line(error)}"
                ) from error
        return parse(serialized, self.codec).take(inverse)

    def fetch(self, views: np.ndarray, source: ImageSource) -> tuple[ViewRecords, LoadedImages]:
        """Implements `RecordSource`: a replay draws nothing.

        Raises:
          DataError: a shard is damaged, or a record is of no example.
        """
        records = self.read(views)
        if (wrong := (records.example < 0) | (records.example >= source.images.num_examples)).any():
            row = int(np.argmax(wrong))
            raise DataError(
                f"{self.directory}: view {views[row]} is of example {records.example[row]}, the data set has "
                f"{source.images.num_examples}"
            )
        return records, source.load(records.example)


class Store:
    """A published store.

    Attributes:
      path: its directory.
      spec: its spec.
      views: reader of the training views.
      eval_splits: names of the splits that have evaluation logits.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        check_links(self.path, *STORE_DIRECTORIES)
        self.spec = Spec.load(path)
        self._codec = self.spec.make_codec()
        digest = self.spec.digest()
        manifest = load_manifest(self.path, digest=digest)
        if "views" not in manifest or not manifest["views"].shards:
            raise UserError(
                f"--store={path}: nothing is published there yet; finish it by running its precompute again: "
                f"{self.spec.provenance.get('command', 'python -m pipeline.precompute ...')}"
            )
        self.views = self._split(self.path, "views", manifest["views"])
        if self.views.num_records % self.spec.num_examples:
            raise DataError(
                f"{path}: {self.views.num_records} views are not whole epochs of {self.spec.num_examples}"
            )
        self._eval = load_manifest(self.path / EVAL_DIRECTORY, digest=digest)
        self.eval_splits = sorted(self._eval)

    def _split(self, directory: Path, name: str, manifest: SplitManifest) -> SplitReader:
        return SplitReader(
            directory,
            name,
            manifest,
            codec=self._codec,
            num_examples=self.spec.num_examples if name == "views" else manifest.records,
        )

    def readers(self) -> Iterator[SplitReader]:
        """The readers of all splits: the training views, then the evaluation splits."""
        yield self.views
        for split in self.eval_splits:
            yield self.eval_reader(split)

    def file_problems(self) -> Iterator[str]:
        """What is wrong with each published shard that is missing or not as long as the manifest says; opens none."""
        for reader in self.readers():
            for number, info in enumerate(reader.manifest.shards):
                path = reader.directory / shard_name(reader.split, number)
                size = path.stat().st_size if path.is_file() else "no"
                if size != info.bytes:
                    yield f"{path}: {size} bytes here, {info.bytes} in the manifest"

    def check_files(self) -> None:
        """Whether every published shard is there and as long as the manifest says; opens none.

        Raises:
          DataError: one is not; named with both sizes.
        """
        for problem in self.file_problems():
            raise DataError(
                f"{problem}; bring the file back from a copy, or run its precompute again with --repair"
            )

    @property
    def epochs(self) -> int:
        """Whole epochs stored."""
        return self.views.num_records // self.spec.num_examples

    @property
    def held_out_splits(self) -> list[str]:
        """Evaluated splits that are no part of what is trained on; `train[:90%]` is part of `train`."""
        trained_on = re.findall(r"\w+", self.spec.dataset["split"])
        return [name for name in self.eval_splits if name not in trained_on]

    def eval_reader(self, split: str) -> SplitReader:
        """Reader of the teacher's logits on the evaluation crops of a split.

        Raises:
          UserError: the store has none.
        """
        if split not in self._eval:
            raise UserError(
                f"--eval_split={split}: {self.path} has evaluation logits of {', '.join(self.eval_splits) or 'no split'}"
            )
        return self._split(self.path / EVAL_DIRECTORY, split, self._eval[split])

    def check_dataset(self, found: dict[str, Any], *, split: str = "views") -> None:
        """Compares a data set's identity with the one that the store was made from.

        Raises:
          DataError: they differ; both sides are shown.
        """
        stored = self.spec.dataset if split == "views" else self._eval[split].dataset
        if lines := differences(found, stored, sides=("here", "in the store")):
            raise DataError(
                f"this is not the data set that {self.path} was made from: {'; '.join(lines)}; pass the --data_dir "
                "that the teacher saw"
            )
