"""Several stores of one view axis as one store, and a store at another image size.

Stores with the same view axis have the same view at every index, so the logits of a view can be averaged. A view whose box does
not depend on the image size can be rendered at any size.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from pipeline.errors import DataError, UserError
from pipeline.storage.cache import SHARD_CACHE_BYTES
from pipeline.store.identity import DatasetIdentity, digest_of
from pipeline.store.layout import VIEWS_SPLIT
from pipeline.store.reader import StoreReader
from pipeline.store.spec import differences
from pipeline.store.view_store import StoredRecords, ViewStore
from pipeline.views.eval_crop import EvalCrop
from pipeline.views.input import check_sources
from pipeline.views.records import NO_FINGERPRINT, ViewRecords
from pipeline.views.source import ImageSource, LoadedImages


def average(logits: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """Weighted mean of the logits of several teachers, float32 [n, C] each, as float32 [n, C].

    The products are exact in float64, and the sum is rounded to float32 once, so that `average_in_graph` gives the same bits.
    """
    total = np.zeros(logits[0].shape, np.float64)
    for part, weight in zip(logits, weights, strict=True):
        total += part.astype(np.float64) * weight
    return total.astype(np.float32)


def average_in_graph(logits: Sequence[tf.Tensor], weights: Sequence[float]) -> tf.Tensor:
    """`average` as TensorFlow ops."""
    # A single product: TensorFlow's optimizer would factor equal weights out of a sum of products.
    parts = tf.cast(tf.stack(logits), tf.float64) * tf.constant(weights, tf.float64, [len(weights), 1, 1])
    first, *others = tf.unstack(parts)
    for part in others:
        first += part
    return tf.cast(first, tf.float32)


class CombinedRecords:
    """Records of one split of several stores, or of one store at another image size; `StoredRecords`.

    Args:
      split: name of the split.
      readers: readers of the split, by store.
      weights: weight of each store's logits.
      image_size: side of a rendered crop in pixels.
      eval_crop: evaluation crop, whose boxes may depend on the image size; None for training views.

    Raises:
      DataError: the stores have different numbers of evaluation crops.
    """

    def __init__(
        self,
        split: str,
        readers: Sequence[tuple[ViewStore, StoredRecords]],
        *,
        weights: Sequence[float],
        image_size: int,
        eval_crop: EvalCrop | None = None,
    ) -> None:
        self.split = split
        self._stores = [store for store, _ in readers]
        self._readers = [reader for _, reader in readers]
        self._weights, self._image_size, self._eval_crop = weights, image_size, eval_crop
        self.num_examples, self.num_classes = self._readers[0].num_examples, self._readers[0].num_classes
        for store, reader in readers:
            if reader.num_examples != self.num_examples:
                raise DataError(
                    f"{split}: {self.num_examples} records in {self._stores[0].location}, {reader.num_examples} in "
                    f"{store.location}; restore both from copies"
                )

    @property
    def num_records(self) -> int:
        """Number of records that all stores have."""
        return min(reader.num_records for reader in self._readers)

    def read(self, views: np.ndarray) -> ViewRecords:
        """Reads the records of views int64 [n], in any order, with duplicates allowed.

        Raises:
          DataError: a shard is damaged, or a view differs between the stores.
        """
        return self._combine(views, [reader.read(views) for reader in self._readers])

    def fetch(self, views: np.ndarray, source: ImageSource) -> tuple[ViewRecords, LoadedImages]:
        """Implements `RecordSource`; boxes of evaluation crops are those for `image_size`.

        Raises:
          DataError: see `read` and `SplitReader.fetch`; or a box of an evaluation crop is not that of its definition.
        """
        first, loaded = self._readers[0].fetch(views, source)
        each = [first, *(reader.read(views) for reader in self._readers[1:])]
        records = self._combine(views, each)
        if self._eval_crop is None:
            return records, loaded
        check_sources(views, records, loaded)  # an image of another size has another box
        sizes = loaded.sizes()
        for store, part in zip(self._stores, each, strict=True):
            expected = self._eval_crop.boxes(sizes, store.image_size)
            self._compare("box", views, (expected, "by its definition"), (part.box, f"in {store.location}"))
        return dataclasses.replace(records, box=self._eval_crop.boxes(sizes, self._image_size)), loaded

    def _combine(self, views: np.ndarray, each: Sequence[ViewRecords]) -> ViewRecords:
        """Compares the parameters of views between the stores, and averages their logits."""
        first = each[0]
        hashes: dict[int, tuple[np.ndarray, str]] = {}  # by image size, with the place
        names = ["example", "source_hash", "flip", "ratio"] + ["box"] * (self._eval_crop is None)
        for store, records in zip(self._stores, each, strict=True):
            there = f"in {store.location}"
            for name in names:
                mine = getattr(first, name), f"in {self._stores[0].location}"
                self._compare(name, views, mine, (getattr(records, name), there))
            known = hashes.setdefault(store.image_size, (records.crop_hash, there))
            self._compare("crop_hash", views, known, (records.crop_hash, there))
        unknown = np.full(len(views), NO_FINGERPRINT), ""
        return dataclasses.replace(
            first,
            crop_hash=hashes.get(self._image_size, unknown)[0],
            logits=average([records.logits for records in each], self._weights),
        )

    def _compare(
        self, name: str, views: np.ndarray, one: tuple[np.ndarray, str], other: tuple[np.ndarray, str]
    ) -> None:
        """Compares a column of records, each with the place that it comes from."""
        wrong = (one[0] != other[0]).reshape(len(views), -1).any(axis=1)
        if not wrong.any():
            return
        row = int(np.argmax(wrong))
        values = [f"{column[row].tolist()} {place}" for column, place in (one, other)]
        what = "view" if self.split == VIEWS_SPLIT else f"example of {self.split}"
        raise DataError(
            f"{what} {views[row]}: {name} is {values[0]}, {values[1]}; both must be the same: run pipeline.verify on the stores, and "
            "precompute the wrong one again"
        )


class CombinedStore(ViewStore):
    """Several stores of one view axis as one, or one store at another image size. Made by `combine`.

    Args:
      stores: stores, 1 or more.
      weights: weights of their logits, with sum 1.
      image_size: side of a rendered crop in pixels.
    """

    def __init__(self, stores: Sequence[ViewStore], *, weights: Sequence[float], image_size: int) -> None:
        self._stores, self._weights, self._image_size = tuple(stores), tuple(weights), image_size
        self.location = " and ".join(store.location for store in stores)
        self.spec, self.classes = stores[0].spec, stores[0].classes
        self.eval_splits = [
            name for name in stores[0].eval_splits if all(name in store.eval_splits for store in stores)
        ]
        self.views = self._records(VIEWS_SPLIT, [store.views for store in stores])

    def _records(
        self, split: str, readers: Sequence[StoredRecords], *, eval_crop: EvalCrop | None = None
    ) -> CombinedRecords:
        return CombinedRecords(
            split,
            list(zip(self._stores, readers, strict=True)),
            weights=self._weights,
            image_size=self._image_size,
            eval_crop=eval_crop,
        )

    @property
    def stores(self) -> Sequence[ViewStore]:
        """Implements `ViewStore`."""
        return self._stores

    @property
    def view_bytes(self) -> int:
        """Implements `ViewStore`."""
        return sum(store.view_bytes for store in self._stores)

    @property
    def weights(self) -> Sequence[float]:
        """Implements `ViewStore`."""
        return self._weights

    @property
    def image_size(self) -> int:
        """Implements `ViewStore`."""
        return self._image_size

    def identity(self) -> dict[str, Any]:
        """Implements `ViewStore`."""
        out = self.spec_identity()
        if self._image_size != self._stores[0].image_size:
            out["image_size"] = self._image_size
        return out

    def spec_identity(self) -> dict[str, Any]:
        """The part of `identity` that does not depend on the image size."""
        if len(self._stores) == 1:
            return self._stores[0].identity()
        parts = {
            "stores": [store.spec.digest() for store in self._stores],
            "store_weights": list(self._weights),
        }
        return {"spec": digest_of(parts), **parts}

    def eval_reader(self, split: str) -> CombinedRecords:
        """Implements `ViewStore`."""
        readers = [store.eval_reader(split) for store in self._stores]
        return self._records(split, readers, eval_crop=self.spec.eval_crop)

    def refresh(self) -> None:
        """Implements `ViewStore`."""
        for store in self._stores:
            store.refresh()

    def check_files(self) -> None:
        """Implements `ViewStore`."""
        for store in self._stores:
            store.check_files()

    def check_dataset(self, found: DatasetIdentity, *, split: str = VIEWS_SPLIT) -> None:
        """Implements `ViewStore`."""
        for store in self._stores:
            store.check_dataset(found, split=split)


def open_stores(
    locations: Sequence[str | Path],
    *,
    weights: Sequence[float] | None = None,
    image_size: int | None = None,
    shard_cache_bytes: int = SHARD_CACHE_BYTES,
    open_store: Callable[..., StoreReader] = StoreReader,
) -> ViewStore:
    """Opens stores and combines them; see `combine`. Each store has its own cache of shards.

    Raises:
      UserError, DataError: see `StoreReader` and `combine`.
    """
    stores = [open_store(location, shard_cache_bytes=shard_cache_bytes) for location in locations]
    return combine(stores, weights=weights, image_size=image_size)


def combine(
    stores: Sequence[ViewStore], *, weights: Sequence[float] | None = None, image_size: int | None = None
) -> ViewStore:
    """Several stores as one, or one store at another image size; a single store at its own size is returned as it is.

    Args:
      stores: stores of one view axis, 1 or more.
      weights: positive weight of each store's logits; they are divided by their sum. Equal weights by default.
      image_size: side of a rendered crop in pixels; the first store's by default.

    Raises:
      UserError: the stores cannot be combined, or their views cannot be rendered at that size; shows both sides.
    """
    first = stores[0]
    for number, store in enumerate(stores[1:], start=1):
        _check_pair(stores[:number], store)
    size = first.image_size if image_size is None else image_size
    if size != first.image_size:
        policy = first.spec.policy
        if not policy.any_size:
            raise UserError(
                f"`image_size`={size}: {first.location} has views of the policy {policy.name}, whose boxes are windows of the image "
                f"resized for crops of {first.image_size} pixels; omit `image_size`, or precompute a store at {size} pixels"
            )
        dataclasses.replace(policy, image_size=size)  # checks the range
    if weights is None:
        weights = [1.0] * len(stores)
    elif len(weights) != len(stores) or not all(0 < weight < float("inf") for weight in weights):
        raise UserError(
            f"`weights`={','.join(f'{weight:g}' for weight in weights)}: expected {len(stores)} numbers above 0, one per store"
        )
    if len(stores) == 1 and size == first.image_size:
        return first
    # As float32, so that their products with logits are exact in float64.
    shares = [float(np.float32(weight / sum(weights))) for weight in weights]
    return CombinedStore(stores, weights=shares, image_size=size)


def _check_pair(earlier: Sequence[ViewStore], store: ViewStore) -> None:
    """Checks that a store can be combined with others.

    Raises:
      UserError: see `combine`.
    """
    first = earlier[0]
    for other in earlier:
        if other.spec.digest() == store.spec.digest():
            raise UserError(
                f"`store`={store.location}: is the same store as {other.location}, spec digest {store.spec.digest()[:16]}; expected "
                "stores of different teachers"
            )
    for what, ours, theirs in (
        ("view axis", first.spec.view_axis.to_json(), store.spec.view_axis.to_json()),
        ("teacher", {"classes": first.spec.num_classes}, {"classes": store.spec.num_classes}),
        ("evaluation crop", first.spec.eval_crop.to_json(), store.spec.eval_crop.to_json()),
    ):
        if lines := differences(ours, theirs, sides=(f"in {first.location}", f"in {store.location}")):
            raise UserError(
                f"`store`={store.location}: cannot be combined with {first.location}, since the {what} differs: {'; '.join(lines)}"
            )
    _check_entries("class names", first, first.classes.names, store, store.classes.names)
    _check_entries("class maps", first, first.classes.class_map, store, store.classes.class_map)
    _check_temperatures([*earlier, store])


def _check_entries(
    what: str,
    first: ViewStore,
    ours: Sequence[object] | None,
    store: ViewStore,
    theirs: Sequence[object] | None,
) -> None:
    """Refuses different names or maps of the classes, if both stores have them."""
    if ours is None or theirs is None or ours == theirs:
        return
    pairs = enumerate(itertools.zip_longest(ours, theirs))
    row, one, other = next((row, *pair) for row, pair in pairs if pair[0] != pair[1])
    raise UserError(
        f"`store`={store.location}: cannot be combined with {first.location}, since their {what} differ, first at {row}: {one} in "
        f"{first.location}, {other} in {store.location}"
    )


def _check_temperatures(stores: Sequence[ViewStore]) -> None:
    """Refuses codecs that keep the logits for different temperatures."""
    fixed = {
        store.location: temperature
        for store in stores
        if (temperature := store.spec.make_codec().only_temperature) is not None
    }
    if len({*fixed.values()}) > 1:
        sides = ", ".join(f"{temperature:g} in {location}" for location, temperature in fixed.items())
        raise UserError(
            f"`store`={stores[-1].location}: topk codecs keep the logits for one temperature, which differs: {sides}; precompute at "
            "one temperature, or with other codecs"
        )
