"""Reads a store: whole epochs of whole shards, verified before use.

The published shards are a prefix of all shards, and may end inside an epoch while a precompute is running.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from pipeline.errors import DataError, UnpublishedError, UserError
from pipeline.errors.causes import first_line
from pipeline.storage.bucket import BucketDirectory, is_url
from pipeline.storage.cache import SHARD_CACHE_BYTES
from pipeline.storage.files import check_links
from pipeline.store.classes import read_classes
from pipeline.store.codecs import Codec
from pipeline.store.identity import DatasetIdentity
from pipeline.store.layout import EVAL_DIRECTORY, STORE_DIRECTORIES, VIEWS_SPLIT, below, split_directory
from pipeline.store.metadata import SplitManifest, load_manifest, published_lengths
from pipeline.store.metadata_copy import MetadataCopy, naming
from pipeline.store.openers import DOWNLOADS, BucketOpener, DiskOpener, Opener, ShardCache
from pipeline.store.serialization import parse
from pipeline.store.shards import shard_name
from pipeline.store.spec import Spec, differences
from pipeline.store.view_store import ViewStore
from pipeline.views.records import ViewRecords
from pipeline.views.source import ImageSource, LoadedImages


class SplitReader:
    """Random access to the records of one split; a `RecordSource`.

    A shard is compared with the manifest when it is first opened.

    Attributes:
      split: name of the split.
      num_records: number of published records; of the training views, those of whole epochs.
      num_examples: number of examples N.
      num_classes: number of classes C.
      manifest: manifest of the split.
      opener: opens the shards.
      codec: codec of the logits.
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
        """Adds newly published shards. Must not run while records are read.

        Raises:
          DataError: shards that were published before have changed.
        """
        known = self.manifest.shards
        if manifest.shards[: len(known)] != known:
            raise DataError(
                f"{self.opener.place(0)}: the manifest of published shards has changed; open the store again"
            )
        self.opener.extend(manifest.shards)
        self._take(manifest, num_records)

    def verify(self, number: int) -> None:
        """Compares a shard's size, SHA-256 and number of records with the manifest.

        Raises:
          DataError: one of them differs; shows both values.
        """
        self.opener.verify(number).close()

    def read(self, views: np.ndarray) -> ViewRecords:
        """Reads the records of views int64 [n], in any order, with duplicates allowed.

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
        """Reads the records of ascending views int64 [n] from an open shard, as returned by `opener.verify`.

        Raises:
          DataError: the shard is damaged.
        """
        return parse(self._serialized(number, shard, views), self.codec)

    def _serialized(self, number: int, shard: ArrayRecordReader, views: np.ndarray) -> list[bytes]:
        try:
            records: list[bytes] = shard.read((views - self._starts[number]).tolist())
        except (RuntimeError, IndexError, ValueError) as error:
            raise DataError(
                f"{self.opener.place(number)}: cannot read records from view {views[0]} on: {first_line(error)}"
            ) from error
        return records

    def fetch(self, views: np.ndarray, source: ImageSource) -> tuple[ViewRecords, LoadedImages]:
        """Implements `RecordSource` with the stored records.

        Raises:
          DataError: a shard is damaged, or a record has an example outside of the data set.
        """
        records = self.read(views)
        if (wrong := (records.example < 0) | (records.example >= source.images.num_examples)).any():
            row = int(np.argmax(wrong))
            shard = int(np.searchsorted(self._ends, views[row], side="right"))
            raise DataError(
                f"{self.opener.place(shard)}: view {views[row]} has example {records.example[row]}, expected 0 to "
                f"{source.images.num_examples - 1}; the shard or the data set is another"
            )
        return records, source.load(records.example)


class StoreReader(ViewStore):
    """A published store, on a file system of this machine or in a bucket.

    Args:
      location: directory of the store, or its URL.
      shard_cache_bytes: size limit of local copies of shards from a bucket.
      in_order: whether views are read in order, so that the following shards are prefetched.
      unfinished: whether to accept a store without a published epoch, which has no `views`.

    Attributes (see also `ViewStore`):
      path: directory of the metadata: the store, or a local copy.
      views: reader of the training views.

    Raises:
      UserError: there is no store, nothing is published, or the cache is too small.
      DataError: the metadata are damaged.
    """

    views: SplitReader

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
        self.classes = read_classes(self.path, self.spec)
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
                f"`store`={self.path}: has no published epoch; rerun its precompute to finish it: "
                f"{self.spec.provenance.get('command', 'python -m pipeline.precompute ...')}"
            )

    def refresh(self) -> None:
        """Implements `ViewStore`."""
        if self._bucket is not None and not self._copy.refresh_published():
            return
        with naming(self.path, self.location):
            lengths = published_lengths(self.path).get(VIEWS_SPLIT, [])
            if len(lengths) == len(self.views.manifest.shards):
                return
            manifest = load_manifest(self.path, digest=self.spec.digest()).get(VIEWS_SPLIT)
            if manifest is None:
                raise DataError(f"{self.path}: the published views have disappeared; open the store again")
            self.views.extend(manifest, self._whole_epochs(manifest))

    def _whole_epochs(self, manifest: SplitManifest) -> int:
        """Number of views in whole epochs."""
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
        """Checks that three shards fit: the current, the next, and that of the epoch's first view. Otherwise each batch would
        fetch shards again.
        """
        largest = max(shard.bytes for shard in self.views.manifest.shards)
        if self._cache.capacity < (needed := 3 * largest):
            raise UserError(
                f"`shard_cache_bytes`={self._cache.capacity}: too small for three shards of {self.location}, which have up to "
                f"{largest} bytes; expected at least {needed}"
            )

    def readers(self) -> Iterator[SplitReader]:
        """Yields the readers of the training views and of the evaluation splits."""
        if self._has_views:
            yield self.views
        for split in self.eval_splits:
            yield self.eval_reader(split)

    def file_problems(self) -> Iterator[str]:
        """Describes published shards that are missing or differ in size from the manifest, without opening them."""
        for reader in self.readers():
            sizes = reader.opener.files()
            for number, info in enumerate(reader.manifest.shards):
                if (size := sizes.get(shard_name(reader.split, number), "no")) != info.bytes:
                    yield f"{reader.opener.place(number)}: {size} bytes here, {info.bytes} in the manifest"

    def check_files(self) -> None:
        """Implements `ViewStore`."""
        for problem in self.file_problems():
            raise DataError(f"{problem}; restore the file from a copy, or rerun the precompute with --repair")

    @property
    def stores(self) -> Sequence[StoreReader]:
        """Implements `ViewStore`: this one."""
        return (self,)

    @property
    def view_bytes(self) -> int:
        """Implements `ViewStore`."""
        return self.views.manifest.bytes

    def eval_reader(self, split: str) -> SplitReader:
        """Implements `ViewStore`."""
        if split not in self._eval:
            raise UserError(
                f"`eval_split`={split}: {self.location} has evaluation logits of {', '.join(self.eval_splits) or 'no split'}"
            )
        return self._split(split, self._eval[split])

    def check_dataset(self, found: DatasetIdentity, *, split: str = VIEWS_SPLIT) -> None:
        """Implements `ViewStore`."""
        stored = self.spec.dataset if split == VIEWS_SPLIT else self._eval[split].dataset
        if lines := differences(found.to_json(), stored.to_json(), sides=("here", "in the store")):
            raise DataError(
                f"data set differs from that of {self.location}: {'; '.join(lines)}; pass the `data_dir` of the data set that the "
                "teacher saw"
            )
