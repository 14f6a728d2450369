"""The Python API of stores: a store as a sequence of views, as `tf.data`, as NumPy batches and as a figure.

    from pipeline import open_store

    store = open_store("runs/mnist_5k/store")
    print(store)
    store.show([0, 1, 1020])
    student.fit(store.as_dataset(batch_size=64, epochs=50))

A view is never rendered unverified: the fingerprints of its crop and of its source image are compared with the record.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, SupportsIndex, overload

import numpy as np
import tensorflow as tf

from pipeline.errors import UserError
from pipeline.inputs import embedded
from pipeline.inputs.dataset import Dataset
from pipeline.inputs.labels import match_classes
from pipeline.inputs.locate import open_dataset
from pipeline.pages.template import report_extra
from pipeline.pages.views import View, ViewImages
from pipeline.storage.bucket import is_url
from pipeline.storage.cache import SHARD_CACHE_BYTES
from pipeline.store.combination import combine, open_stores
from pipeline.store.replay import replay_input
from pipeline.store.view_store import ViewStore
from pipeline.views.input import Batch, ViewInput
from pipeline.views.mix import mix
from pipeline.views.policies.base import ViewPolicy
from pipeline.views.policies.inception import Inception
from pipeline.views.records import SampledViews
from pipeline.views.source import ImageSource

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class NumpyBatches:
    """Batches of (mixed views float32 [B, S, S, 3] in 0..255, logits float32 [B, C]); can be iterated repeatedly.

    Made by `Store.as_numpy`. The arrays are writable, so that `torch.from_numpy` takes them as they are.
    """

    def __init__(self, view_input: ViewInput, batches: tf.data.Dataset, starts: range) -> None:
        self._input, self._batches, self._starts = view_input, batches, starts

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        done = 0
        try:
            for views, logits in self._batches:
                yield views.numpy(), logits.numpy()
                done += 1
        except tf.errors.OpError as error:
            start = self._starts[min(done, len(self) - 1)]
            raise self._input.explain(start, error) from error


class Store:
    """A published store with its data set: a sequence of views. Opened by `open_store`.

    Attributes:
      spec: what the records are determined by: data set, seed, policy, teacher, codec; of several stores, that of the first.
      epochs: whole epochs stored.
      temperature: the spec's, which the precompute was run with.
      class_names: name of each class of the logits: the teacher's, as the precompute was given them, or the data set's.
      dataset: the images and labels.
      reader: the records without the images, evaluation splits included; of several stores, their combination.
    """

    def __init__(self, records: ViewStore, dataset: Dataset) -> None:
        self.reader = records
        self.spec = records.spec
        self.epochs = records.epochs
        self.temperature = self.spec.temperature
        self.class_names = match_classes(dataset, self.spec.num_classes, records.classes).names
        self.dataset = dataset

    @functools.cached_property
    def _images(self) -> ViewImages:
        return ViewImages(replay_input(self.reader, self.dataset, 1), self.dataset)

    def __len__(self) -> int:
        """Number of views."""
        return self.reader.views.num_records

    def __repr__(self) -> str:
        spec, policy = self.spec, self.spec.policy
        mixup = "mixup" if policy.mixup else "no mixup"
        return (
            f"Store {self.reader.location}\n"
            f"  views        {len(self):,}: {self.epochs:,} epochs of {spec.num_examples:,} examples\n"
            f"  data set     {spec.dataset.name}, split {spec.dataset.split}\n"
            f"  policy       {policy.name}, {policy.image_size} x {policy.image_size} pixels, {mixup}, seed {spec.seed}\n"
            f"  logits       {spec.num_classes:,} classes, codec {spec.codec}\n"
            f"  temperature  {self.temperature:g}\n"
            f"  evaluated    {', '.join(self.reader.eval_splits) or 'no split'}"
        )

    @overload
    def __getitem__(self, index: SupportsIndex) -> View: ...

    @overload
    def __getitem__(self, index: slice) -> list[View]: ...

    def __getitem__(self, index: SupportsIndex | slice) -> View | list[View]:
        """The view at an index, from the end if it is negative; a list of views for a slice.

        Raises:
          IndexError: the store has no such view.
          DataError: a shard is damaged.
        """
        if isinstance(index, slice):
            return self._views(range(*index.indices(len(self))))
        number = operator.index(index)
        if not -len(self) <= number < len(self):
            raise IndexError(f"view {number} of a store of {len(self)} views")
        return self._views([number % len(self)])[0]

    def __iter__(self) -> Iterator[View]:
        return (self[number] for number in range(len(self)))

    def _views(self, indices: Iterable[int]) -> list[View]:
        numbers = np.fromiter(indices, np.int64)
        return list(self._images.views(numbers, self.reader.views.read(numbers))) if len(numbers) else []

    def show(self, views: SupportsIndex | Iterable[SupportsIndex]) -> Figure:
        """Draws views: image with box, crop, partner's crop, mixed view, and the teacher's five likeliest classes.

        Args:
          views: one view index or several, as for indexing.

        Returns:
          A Matplotlib figure, which a notebook displays as the value of a cell. `savefig` writes it to a file.

        Raises:
          IndexError: the store has no such view.
          DataError: a fingerprint differs, or a shard is damaged.
          UserError: Matplotlib is not installed.
        """
        with report_extra("show"):
            from pipeline.pages.view_figure import draw_views
        indices = views if isinstance(views, Iterable) else [views]
        return draw_views([self[index] for index in indices], self.class_names, self.dataset.class_names)

    def as_dataset(
        self,
        batch_size: int,
        *,
        epochs: int | None = None,
        first_step: int = 0,
        image_size: int | None = None,
        image_cache_bytes: int = 0,
    ) -> tf.data.Dataset:
        """Batches of mixed views and logits for `fit`, in the order of the view axis.

        Step `t` has the views `[t * batch_size, (t + 1) * batch_size)`, as in `trainer.train`. Both fingerprints of every
        view are compared; at another image size, that of the source image, and in one batch of 32, the first one included,
        that of the crop at the store's size. Views at the end that do not fill a batch are left out.

        Args:
          batch_size: B, views per batch.
          epochs: epochs of the store to use; all by default.
          first_step: step at which to begin; to resume, the number of steps done.
          image_size: S, side of the views in pixels; the store's by default. Views of the policy `light` have one size.
          image_cache_bytes: memory for decoded images, used if all images fit; 0 decodes each image when it is needed.

        Returns:
          A `tf.data.Dataset` of (views float32 [B, S, S, 3] in 0..255, logits float32 [B, C]) with static shapes and a
          known cardinality.

        Raises:
          UserError: a number is out of range.
        """
        return self._batches(batch_size, epochs, first_step, image_size, image_cache_bytes)[1]

    def as_numpy(
        self,
        batch_size: int,
        *,
        epochs: int | None = None,
        first_step: int = 0,
        image_size: int | None = None,
        image_cache_bytes: int = 0,
    ) -> NumpyBatches:
        """The batches of `as_dataset` as NumPy arrays, for PyTorch, JAX or your own loop.

        Args:
          batch_size, epochs, first_step, image_size, image_cache_bytes: see `as_dataset`.

        Returns:
          An iterable with a length. Iterating raises a DataError if a fingerprint differs or a shard is damaged.

        Raises:
          UserError: a number is out of range.
        """
        return NumpyBatches(*self._batches(batch_size, epochs, first_step, image_size, image_cache_bytes))

    def _batches(
        self,
        batch_size: int,
        epochs: int | None,
        first_step: int,
        image_size: int | None,
        image_cache_bytes: int,
    ) -> tuple[ViewInput, tf.data.Dataset, range]:
        starts = self._starts(batch_size, epochs, first_step)
        reader = self.reader
        if image_size is not None:
            reader = combine(reader.stores, weights=reader.weights, image_size=image_size)
        view_input = replay_input(reader, self.dataset, batch_size, image_cache_bytes=image_cache_bytes)

        @tf.autograph.experimental.do_not_convert
        def select(batch: Batch) -> tuple[tf.Tensor, tf.Tensor]:
            return mix(batch["crops"], batch["partner"], batch["ratio"][:batch_size]), batch["logits"]

        first_views = tf.data.Dataset.range(starts.start, starts.stop, starts.step)
        return view_input, view_input.dataset(first_views).map(select), starts

    def _starts(self, batch_size: int, epochs: int | None, first_step: int) -> range:
        """First view of each step."""
        if batch_size < 1:
            raise UserError(f"`batch_size`={batch_size}: expected 1 or more")
        if epochs is None:
            epochs = self.epochs
        if not 1 <= epochs <= self.epochs:
            raise UserError(
                f"`epochs`={epochs}: {self.reader.location} holds {self.epochs}; use 1 to {self.epochs}, or precompute more"
            )
        views = epochs * self.spec.num_examples
        steps = views // batch_size
        if not steps:
            raise UserError(f"`batch_size`={batch_size}: expected at most {views}, the number of views")
        if not 0 <= first_step < steps:
            raise UserError(f"`first_step`={first_step}: expected 0 to {steps - 1}, the last step")
        return range(first_step * batch_size, steps * batch_size, batch_size)


def open_store(
    location: str | Path | Sequence[str | Path],
    *,
    weights: Sequence[float] | None = None,
    data_dir: str | Path | None = None,
    verify: bool = True,
    shard_cache_bytes: int = SHARD_CACHE_BYTES,
) -> Store:
    """Opens a published store and the data set that it was made from.

    Args:
      location: directory of the store, or its `s3://` or `gs://` URL; a list of stores of one view axis, whose logits are
        averaged.
      weights: weight of each store's logits in the mean; equal by default.
      data_dir: TFDS data directory with the data set; by default the one that the precompute used.
      verify: whether to compare the renderer of this machine, and the presence and size of every shard, with the store.
        The digest of the spec, the identity of the data set, the SHA-256 of each shard that is read, and the fingerprints
        of each view that is rendered, are compared in any case.
      shard_cache_bytes: disk space for shards fetched from a bucket.

    Raises:
      UserError: there is no published store, the stores cannot be combined, or the data set is not found.
      DataError: the store is damaged, or does not match the data set or this machine; the message shows both sides.
    """
    locations = [location] if isinstance(location, str | Path) else list(location)
    if not locations:
        raise UserError("`location`: got an empty list; expected one store or several")
    places = [str(place) if is_url(place) else Path(place).expanduser() for place in locations]
    records = open_stores(places, weights=weights, shard_cache_bytes=shard_cache_bytes)
    if verify:
        records.check_files()
        records.check_renderer()
    data_dir = None if data_dir is None else str(data_dir)
    return Store(records, open_dataset(records, "views", data_dir=data_dir))


def sample_views(
    indices: Iterable[SupportsIndex],
    *,
    dataset: str | None = None,
    split: str = "train",
    data_dir: str | Path | None = None,
    image_feature: str | None = None,
    seed: int = 0,
    policy: ViewPolicy | None = None,
) -> list[View]:
    """Draws views as the precompute would, without a store and without a teacher.

    Data set, seed and policy are the view axis: a store that is made from the same ones holds the same views.

    Args:
      indices: view indices, 0 or more; `epoch * N + position`.
      dataset: `NAME[/CONFIG][:VERSION]`, prepared as ArrayRecord; by default the embedded data set, 5,000 digits.
      split: split or slice to draw from, such as `train[:90%]`.
      data_dir: TFDS data directory; TFDS's own by default.
      image_feature: image feature of the data set; by default the supervised one, or the only one.
      seed: random seed for all augmentations.
      policy: view policy; `Inception()` by default.

    Returns:
      Views without logits.

    Raises:
      UserError: there is no such data set, or an index is negative.
    """
    numbers = np.array([operator.index(index) for index in indices], np.int64)
    if (numbers < 0).any():
        raise UserError(f"`indices`: {numbers.min()} is negative; the view axis begins at 0")
    if dataset is None:
        dataset, data_dir = embedded.DATASET, embedded.prepare_dataset()
    opened = Dataset(dataset, split, data_dir=data_dir, image_feature=image_feature)
    policy = policy or Inception()
    drawn = SampledViews(
        policy=policy, seed=seed, num_examples=opened.num_examples, num_classes=opened.num_classes
    )
    records, _ = drawn.fetch(numbers, ImageSource(opened, policy.renderer()))
    view_input = ViewInput(drawn, ImageSource(opened, policy.renderer()), 1)
    return list(ViewImages(view_input, opened).views(numbers, records))
