"""Reading a store: whole epochs of whole shards, verified before they are used.

What is published is a prefix of the shards, which may end inside an epoch while a precompute is running.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from pipeline.errors import DataError, UnpublishedError, UserError
from pipeline.errors.causes import first_line
from pipeline.storage.bucket import BucketDirectory, is_url
from pipeline.storage.cache import SHARD_CACHE_BYTES
from pipeline.storage.files import check_links
from pipeline.store.codecs import Codec
from pipeline.store.identity import DatasetIdentity
from pipeline.store.layout import EVAL_DIRECTORY, STORE_DIRECTORIES, VIEWS_SPLIT, below, split_directory
from pipeline.store.metadata import SplitManifest, load_manifest, published_lengths
from pipeline.store.metadata_copy import MetadataCopy, naming
from pipeline.store.openers import DOWNLOADS, BucketOpener, DiskOpener, Opener, ShardCache
from pipeline.store.shards import parse, shard_name
from pipeline.store.spec import Spec, differences
from pipeline.store.splits import may_overlap
from pipeline.views.records import ViewRecords
from pipeline.views.source import ImageSource, LoadedImages


class SplitReader:
    """Random access to the records of one split; a `RecordSource`.

    A shard's size and SHA-256 are compared with the manifest when it is first opened.

    Attributes:
      split: its name.
      num_records: views that are published, of the training views those of whole epochs.
      num_examples, num_classes: of the spec.
      manifest: the split's.
      opener: of its shards.
    """

    def __init__(
        self,
        split: str,
        manifest: SplitManifest,
        opener: Opener,
        *,
        codec: Codec,
        num_examples: int,
        num_records: int | None = None,
    ) -> None:
        self.split = split
        self.opener = opener
        self.codec = codec
        self.num_examples = num_examples
        self.num_classes = codec.num_classes
        self._take(manifest, num_records)

    def _take(self, manifest: SplitManifest, num_records: int | None) -> None:
        self.manifest = manifest
        self.num_records = manifest.records if num_records is None else num_records
        lengths = [shard.records for shard in manifest.shards]
        self._ends = np.cumsum(lengths)
        self._starts = self._ends - lengths

    def extend(self, manifest: SplitManifest, num_records: int) -> None:
        """Takes what was published since; not while records are read.

        Raises:
          DataError: what was published before is another now.
        """
        known = self.manifest.shards
        if manifest.shards[: len(known)] != known:
            raise DataError(f"{self.opener.place(0)}: the split's manifest has changed since it was opened")
        self.opener.extend(manifest.shards)
        self._take(manifest, num_records)

    def verify(self, number: int) -> None:
        """Compares a shard's size, SHA-256 and count with the manifest.

        Raises:
          DataError: any of them differs; both sides are shown.
        """
        self.opener.verify(number).close()

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
            shard = self.opener.open(int(number))
            serialized += self._serialized(int(number), shard, distinct[shards == number])
        return parse(serialized, self.codec).take(inverse)

    def read_from(self, number: int, shard: ArrayRecordReader, views: np.ndarray) -> ViewRecords:
        """Records of views int64 [n] of one shard, ascending, by a reader of it such as `opener.verify` returns.

        Raises:
          DataError: the shard is damaged.
        """
        return parse(self._serialized(number, shard, views), self.codec)

    def _serialized(self, number: int, shard: ArrayRecordReader, views: np.ndarray) -> list[bytes]:
        try:
            records: list[bytes] = shard.read((views - self._starts[number]).tolist())
        except (RuntimeError, IndexError, ValueError) as error:
            raise DataError(
                f"{self.opener.place(number)}: records from view {views[0]} on cannot be read: {first_line(error)}"
            ) from error
        return records

    def fetch(self, views: np.ndarray, source: ImageSource) -> tuple[ViewRecords, LoadedImages]:
        """Implements `RecordSource`: a replay draws nothing.

        Raises:
          DataError: a shard is damaged, or a record is of no example.
        """
        records = self.read(views)
        if (wrong := (records.example < 0) | (records.example >= source.images.num_examples)).any():
            row = int(np.argmax(wrong))
            shard = int(np.searchsorted(self._ends, views[row], side="right"))
            raise DataError(
                f"{self.opener.place(shard)}: view {views[row]} is of example {records.example[row]}, the data set has "
                f"{source.images.num_examples}"
            )
        return records, source.load(records.example)


class Store:
    """A published store, on a file system of this machine or in a bucket.

    Args:
      location: its directory, or the URL of one.
      shard_cache_bytes: of a store in a bucket: for its shards, which are fetched ahead of need.
      in_order: whether views are read one after the other, so that the next shards are worth fetching.
      unfinished: whether a store is opened of which no epoch is published yet; it has no `views` then.

    Attributes:
      location: as given.
      path: directory of its metadata: the store's own, or that of a copy.
      spec: its spec.
      views: reader of the training views.
      eval_splits: names of the splits that have evaluation logits.

    Raises:
      UserError: there is no store, or none that is published, or the cache is too small for it.
      DataError: its metadata are damaged.
    """

    def __init__(
        self,
        location: str | Path,
        *,
        shard_cache_bytes: int = SHARD_CACHE_BYTES,
        in_order: bool = True,
        unfinished: bool = False,
    ) -> None:
        self.location = str(location)
        self._unfinished = unfinished
        self._bucket = BucketDirectory(self.location) if is_url(location) else None
        if self._bucket is None:
            self.path = Path(location)
            check_links(self.path, *STORE_DIRECTORIES)
        else:
            self._copy = MetadataCopy(self._bucket)
            self.path = self._copy.path
            self._cache = ShardCache(shard_cache_bytes)
            self._ahead = DOWNLOADS if in_order else 1
        with naming(self.path, self.location):
            self._load()
        if self._bucket is not None and self._has_views:
            self._check_cache()

    def _load(self) -> None:
        self.spec = Spec.load(self.path)
        self._codec = self.spec.make_codec()
        digest = self.spec.digest()
        self._eval = load_manifest(self.path / EVAL_DIRECTORY, digest=digest)
        self.eval_splits = sorted(self._eval)
        manifest = load_manifest(self.path, digest=digest)
        self._has_views = VIEWS_SPLIT in manifest and manifest[VIEWS_SPLIT].records >= self.spec.num_examples
        if self._has_views:
            self.views = self._split(VIEWS_SPLIT, manifest[VIEWS_SPLIT])
        elif not self._unfinished:
            raise UnpublishedError(
                f"--store={self.path}: nothing is published there yet; finish it by running its precompute again: "
                f"{self.spec.provenance.get('command', 'python -m pipeline.precompute ...')}"
            )

    def refresh(self) -> None:
        """Looks for epochs that were published since; `views` has them then. Not while records are read.

        Raises:
          DataError: the metadata are damaged, or what was published before is another now.
        """
        if self._bucket is not None and not self._copy.refresh_published():
            return
        with naming(self.path, self.location):
            lengths = published_lengths(self.path).get(VIEWS_SPLIT, [])
            if len(lengths) == len(self.views.manifest.shards):
                return
            manifest = load_manifest(self.path, digest=self.spec.digest()).get(VIEWS_SPLIT)
            if manifest is None:
                raise DataError(f"{self.path}: nothing is published there any more")
            self.views.extend(manifest, self._whole_epochs(manifest))

    def _whole_epochs(self, manifest: SplitManifest) -> int:
        """Views of whole epochs."""
        return manifest.records // self.spec.num_examples * self.spec.num_examples

    def _split(self, name: str, manifest: SplitManifest) -> SplitReader:
        views = name == VIEWS_SPLIT
        num_examples = self.spec.num_examples if views else manifest.records
        opener: Opener
        if self._bucket is None:
            opener = DiskOpener(split_directory(self.path, name), name, manifest.shards)
        else:
            bucket = BucketDirectory(self._bucket.place(below(name)))
            epoch = self.spec.num_examples if views else 0
            opener = BucketOpener(
                bucket, name, manifest.shards, cache=self._cache, epoch=epoch, ahead=self._ahead
            )
        return SplitReader(
            name,
            manifest,
            opener,
            codec=self._codec,
            num_examples=num_examples,
            num_records=self._whole_epochs(manifest) if views else None,
        )

    def _check_cache(self) -> None:
        """A shard, the next, and the one with the epoch's first views: less would be fetched for every batch."""
        largest = max(shard.bytes for shard in self.views.manifest.shards)
        if self._cache.capacity < (needed := 3 * largest):
            raise UserError(
                f"--shard_cache_bytes={self._cache.capacity}: {self.location} has shards of {largest} bytes, of which "
                f"three have to fit: {needed} or more"
            )

    def readers(self) -> Iterator[SplitReader]:
        """The readers of all splits: the training views, then the evaluation splits."""
        if self._has_views:
            yield self.views
        for split in self.eval_splits:
            yield self.eval_reader(split)

    def file_problems(self) -> Iterator[str]:
        """What is wrong with each published shard that is missing or not as long as the manifest says; opens none."""
        for reader in self.readers():
            sizes = reader.opener.files()
            for number, info in enumerate(reader.manifest.shards):
                if (size := sizes.get(shard_name(reader.split, number), "no")) != info.bytes:
                    yield f"{reader.opener.place(number)}: {size} bytes here, {info.bytes} in the manifest"

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
        """Evaluated splits and slices with no example that is trained on, as far as their names say."""
        return [name for name in self.eval_splits if not may_overlap(name, self.spec.dataset.split)]

    def eval_reader(self, split: str) -> SplitReader:
        """Reader of the teacher's logits on the evaluation crops of a split.

        Raises:
          UserError: the store has none.
        """
        if split not in self._eval:
            raise UserError(
                f"--eval_split={split}: {self.location} has evaluation logits of {', '.join(self.eval_splits) or 'no split'}"
            )
        return self._split(split, self._eval[split])

    def check_dataset(self, found: DatasetIdentity, *, split: str = VIEWS_SPLIT) -> None:
        """Compares a data set's identity with the one that the store was made from.

        Raises:
          DataError: they differ; both sides are shown.
        """
        stored = self.spec.dataset if split == VIEWS_SPLIT else self._eval[split].dataset
        if lines := differences(found.to_json(), stored.to_json(), sides=("here", "in the store")):
            raise DataError(
                f"this is not the data set that {self.location} was made from: {'; '.join(lines)}; pass the --data_dir "
                "that the teacher saw"
            )
