"""View indices to batches of crops: the input pipeline of precompute, verify, replay and online teacher.

One Python call per batch reads records and sources; TensorFlow's threads do the rest. The input is a pure function of the index of
the batch's first view, so it needs no checkpoint: to resume is to start at another view.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from pipeline.cli.environment import usable_cpus, usable_memory
from pipeline.errors import DataError
from pipeline.errors.causes import find_error
from pipeline.views.batches import EXTRA_CROPS, plan_batch
from pipeline.views.records import NO_FINGERPRINT, RecordSource, ViewRecords
from pipeline.views.render import Renderer, Window, fingerprint32, flip, pack_windows, slice_window
from pipeline.views.source import ImageSource, LoadedImages

_CHECKED, _PREFETCHED = 2, 2  # finished batches ahead of the consumer
CHECK_EVERY = 32  # of this many batches, the first is also rendered at the other sizes and compared there

Planner = Callable[[int], tuple[np.ndarray, np.ndarray]]
Batch = dict[str, tf.Tensor]

_COLUMNS = (
    ("views", tf.int64, ()),
    ("example", tf.int64, ()),
    ("box", tf.int32, (4,)),
    ("flip", tf.bool, ()),
    ("ratio", tf.float32, ()),
    ("crop_hash", tf.int64, ()),
    ("source_hash", tf.int64, ()),
    ("stored", tf.bool, ()),
)

# Columns of a batch that `_compare` takes.
_COMPARED = (
    "views",
    "example",
    "stored",
    "source_hash",
    "found_source_hash",
    "crop_hash",
    "found_crop_hash",
)

# Without AutoGraph, whose conversion of these functions took most of an input's start (3.5 of 4.4 s of CPU time). None has
# Python control flow that depends on tensors.
_as_written = tf.autograph.experimental.do_not_convert


def check_fingerprints(
    views: np.ndarray,
    example: np.ndarray,
    *,
    checked: np.ndarray,
    what: str,
    stored: np.ndarray,
    found: np.ndarray,
) -> None:
    """Compares fingerprints.

    Args:
      views: int64 [n].
      example: int64 [n].
      checked: bool [n], the views to compare.
      what: "source" or "crop".
      stored: fingerprints in the store, int64 [n].
      found: fingerprints computed here, int64 [n].

    Raises:
      DataError: names the first view that differs, its example, and both fingerprints.
    """
    wrong = checked & (stored != found)
    if wrong.any():
        row = int(np.argmax(wrong))
        remedy = {
            "source": "this is not the data set that the teacher saw; pass the `data_dir` that the store was made from",
            "crop": "the source image is the same but renders differently here; use the machine type and TensorFlow version that "
            "spec.json names",
        }[what]
        raise DataError(
            f"view {views[row]} (example {example[row]}): {what} fingerprint is {found[row]:08x} here, "
            f"{stored[row]:08x} in the store ({int(wrong.sum())} of {len(wrong)} views of this batch differ); {remedy}"
        )


def check_sources(views: np.ndarray, records: ViewRecords, loaded: LoadedImages) -> None:
    """Compares the fingerprints of the encoded images of views int64 [n] with their records.

    Raises:
      DataError: one differs; see `check_fingerprints`.
    """
    found = loaded.source_hash
    if found is None:
        found = fingerprint32(tf.constant(loaded.encoded)).numpy()
    check_fingerprints(
        views,
        records.example,
        checked=records.stored,
        what="source",
        stored=records.source_hash,
        found=found,
    )


def _options() -> tf.data.Options:
    options = tf.data.Options()
    # The autotuner sometimes delayed the end of an iterator for as long as the iterator had existed.
    options.autotune.enabled = False
    options.experimental_optimization.apply_default_optimizations = False
    return options


@dataclasses.dataclass(frozen=True)
class ViewInput:
    """Batches of crops of consecutive views.

    Attributes:
      records: source of the views' parameters.
      source: source of the views' images.
      batch_size: B. A batch contains K = `B + extra_crops` crops.
      plan: function from the first view to (views int64 [K], partner int32 [B]); `plan_batch` by default.
      extra_crops: number of crops besides the batch's own, for partners.
      buffer_bytes: memory for batches rendered ahead; a quarter of the machine's memory by default.
      others: inputs of the same batches at other image sizes, those of the stores. One batch of `CHECK_EVERY` is rendered at
        these sizes, too, the first one included, so that its crops can be compared with the stores.
    """

    records: RecordSource
    source: ImageSource
    batch_size: int
    plan: Planner | None = None
    extra_crops: int = EXTRA_CROPS
    buffer_bytes: int | None = None
    others: tuple[ViewInput, ...] = ()

    @property
    def num_crops(self) -> int:
        """K, number of crops per batch."""
        return self.batch_size + self.extra_crops

    @property
    def renderer(self) -> Renderer:
        """The renderer of the crops."""
        return self.source.renderer

    def _plan(self, start: int) -> tuple[np.ndarray, np.ndarray]:
        if self.plan is not None:
            return self.plan(start)
        return plan_batch(start, self.batch_size, num_examples=self.records.num_examples)

    def _fetch(self, start: np.int64) -> list[Any]:
        """Reads the records and images of one batch; the last entries are the images."""
        views, partner = self._plan(int(start))
        records, loaded = self.records.fetch(views, self.source)
        images: list[Any]
        if loaded.bank is None:
            images = [np.array(loaded.encoded, object)]
        else:
            # Checked before cropping: the box of another image may lie outside this one.
            check_sources(views, records, loaded)
            images = [loaded.bank, loaded.places, loaded.source_hash]
        columns = [views, *(getattr(records, name) for name, _, _ in _COLUMNS[1:])]
        return [*columns, partner, records.logits[: self.batch_size], *images]

    @property
    def _fetched_types(self) -> list[tf.DType]:
        """Types of what `_fetch` returns."""
        images = [tf.uint8, tf.int64, tf.int64] if self.source.cached else [tf.string]
        return [*(dtype for _, dtype, _ in _COLUMNS), tf.int32, tf.float32, *images]

    def _render(self, *tensors: tf.Tensor) -> Batch:
        """Renders the output of `_fetch` to a batch with static shapes."""
        count, size = self.num_crops, self.renderer.image_size
        batch: Batch = {}
        for (name, _, shape), tensor in zip(_COLUMNS, tensors, strict=False):
            batch[name] = tf.ensure_shape(tensor, [count, *shape])
        rest = tensors[len(_COLUMNS) :]
        batch["partner"] = tf.ensure_shape(rest[0], [self.batch_size])
        batch["logits"] = tf.ensure_shape(rest[1], [self.batch_size, self.records.num_classes])
        images = rest[2:]

        windows = pack_windows(batch["box"], batch["flip"])

        def crops_of(cut: Callable[..., tf.Tensor], images: tf.Tensor) -> tf.Tensor:
            def render(row: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
                image, window = row[0], Window.unpack(row[1])
                return flip(self.renderer.finish(cut(image, window)), window)

            return tf.map_fn(
                render,
                (images, windows),
                fn_output_signature=tf.TensorSpec([size, size, 3], tf.uint8),
                parallel_iterations=1,  # batches run in parallel; more made the loop slower
            )

        if self.source.cached:
            bank = tf.ensure_shape(images[0], [None])
            batch["found_source_hash"] = tf.ensure_shape(images[2], [count])

            def from_bank(place: tf.Tensor, window: Window) -> tf.Tensor:
                start, length, shape = tf.split(place, [1, 1, 3])
                # Aligned slices are not copied: [length] to [H, W, 3].
                image = tf.reshape(tf.slice(bank, start, length), shape)
                return slice_window(tf.ensure_shape(image, [None, None, 3]), window)

            crops = crops_of(from_bank, tf.ensure_shape(images[1], [count, 5]))
        else:
            encoded = tf.ensure_shape(images[0], [count])
            batch["found_source_hash"] = fingerprint32(encoded)
            # Checked once per batch: inside the loop, the check costs as much as decoding the margin.
            crops = tf.cond(
                tf.reduce_all(tf.io.is_jpeg(encoded)),
                lambda: crops_of(functools.partial(self.renderer.cut, jpeg=True), encoded),
                lambda: crops_of(self.renderer.cut, encoded),
            )
        batch["crops"] = crops
        batch["found_crop_hash"] = fingerprint32(tf.reshape(crops, [count, size * size * 3]))
        return batch

    @staticmethod
    def _compare(*values: np.ndarray) -> None:
        """Compares both fingerprints of every stored view; the crop's if it is stored at this size."""
        got = dict(zip(_COMPARED, values, strict=True))
        at_this_size = got["stored"] & (got["crop_hash"] != NO_FINGERPRINT)
        for what, checked in (("source", got["stored"]), ("crop", at_this_size)):
            check_fingerprints(
                got["views"],
                got["example"],
                checked=checked,
                what=what,
                stored=got[f"{what}_hash"],
                found=got[f"found_{what}_hash"],
            )

    def _check(self, batch: Batch) -> Batch:
        """Passes a batch of tf.data on after `_compare`."""

        def check(*values: np.ndarray) -> np.bool_:
            self._compare(*values)
            return np.bool_(True)

        passed = tf.numpy_function(check, [batch[name] for name in _COMPARED], tf.bool)
        with tf.control_dependencies([passed]):
            batch["crops"] = tf.identity(batch["crops"])
        return batch

    def _parallel(self, threads: int) -> int:
        """Number of batches that are fetched, and rendered, in parallel. Each waiting stage holds as many."""
        crops = self.num_crops * self.renderer.image_size**2 * 3
        encoded = 0 if self.source.cached else self.num_crops * self.source.encoded_bytes
        available = usable_memory() // 4 if self.buffer_bytes is None else self.buffer_bytes
        # A batch that is being rendered holds both encoded images and crops.
        fitting = (available - (_CHECKED + _PREFETCHED) * crops) // (crops + 2 * encoded)
        return max(min(threads, fitting), 1)

    def dataset(
        self, starts: tf.data.Dataset, *, threads: int | None = None, with_others: bool = False
    ) -> tf.data.Dataset:
        """Batches for a data set of first views.

        Args:
          starts: int64 [] elements, in the order wanted.
          threads: batches rendered side by side; as many as there are cores by default; fewer where `buffer_bytes`
            does not allow as many.
          with_others: whether every batch contains its crops at the other sizes.

        Returns:
          A data set, in order, of dicts with static shapes, K = B + extra_crops: `crops` uint8 [K, S, S, 3]; `partner`
          int32 [B]; `logits` float32 [B, C]; and over all K crops `views`, `example`, `box`, `flip`, `ratio`,
          `stored`, and the hashes stored (`crop_hash`, `source_hash`) and found (`found_...`). `with_others`, also
          `others`, a tuple with the batch of each input of `others`.
        """
        own = self._dataset(starts, threads=threads)
        if not self.others:
            return own
        if with_others:
            others = [other._dataset(starts, threads=threads) for other in self.others]
            merged = tf.data.Dataset.zip((own, *others)).map(
                _as_written(lambda batch, *rest: {**batch, "others": rest})
            )
        else:
            checks = [other._passed(starts.shard(CHECK_EVERY, 0)) for other in self.others]
            # An element is passed on when all parts of it are there, so after its check.
            merged = tf.data.Dataset.zip((own, *checks)).map(_as_written(lambda batch, *_: batch))
        return merged.apply(tf.data.experimental.assert_cardinality(own.cardinality())).with_options(
            _options()
        )

    def _passed(self, starts: tf.data.Dataset) -> tf.data.Dataset:
        """`CHECK_EVERY` numbers for each batch whose fingerprints match."""
        rows = self._dataset(starts, threads=1).map(_as_written(lambda batch: batch["views"][0]))
        return rows.flat_map(_as_written(lambda view: tf.data.Dataset.from_tensors(view).repeat(CHECK_EVERY)))

    def _dataset(self, starts: tf.data.Dataset, *, threads: int | None) -> tf.data.Dataset:
        """`dataset` at this size alone."""
        parallel = self._parallel(threads or usable_cpus())
        fetched = starts.map(
            _as_written(
                lambda start: tf.numpy_function(self._fetch, [start], self._fetched_types, stateful=False)
            ),
            num_parallel_calls=parallel,
            deterministic=True,
        )
        rendered = fetched.map(_as_written(self._render), num_parallel_calls=parallel, deterministic=True)
        checking = min(parallel, _CHECKED)  # comparing numbers is fast
        checked = rendered.map(
            _as_written(self._check), num_parallel_calls=checking, deterministic=True
        ).prefetch(_PREFETCHED)
        return checked.with_options(_options())

    @functools.cached_property
    def _rendered(self) -> Callable[..., Batch]:
        """`_render`, traced once."""
        signature = [tf.TensorSpec(None, dtype) for dtype in self._fetched_types]
        return tf.function(self._render, input_signature=signature, autograph=False)

    def _batch(self, index: int, start: int) -> Batch:
        """The batch that starts at view `start`, rendered and compared. One `index` in `CHECK_EVERY` compares other sizes, too."""
        try:
            fetched = self._fetch(np.int64(start))
            if (bank := self.source.bank) is not None:
                fetched[-3] = bank
            batch = self._rendered(*fetched)
        except tf.errors.OpError as error:
            raise self.explain(start, error) from error
        self._compare(*(batch[name].numpy() for name in _COMPARED))
        if index % CHECK_EVERY == 0:
            for other in self.others:
                other._batch(1, start)
        return batch

    def explain(self, start: int, error: Exception) -> Exception:
        """The DataError behind a TensorFlow error in the batch that starts at view `start`."""
        if (found := find_error(error)) is not None:
            return found
        if not isinstance(error, tf.errors.OpError):
            return error
        try:
            views, _ = self._plan(start)
            records, loaded = self.records.fetch(views, self.source)
            check_sources(views, records, loaded)
        except DataError as cause:
            return cause
        return self.source.explain(records.example, error)

    def batches(self, starts: np.ndarray, *, threads: int | None = None) -> Iterator[Batch]:
        """Iterates eagerly over the batches that start at `starts`, int64 [n].

        Raises:
          DataError: an image cannot be decoded, or a fingerprint differs.
        """
        # Not by tf.data: an iterator takes 0.1 to 0.4 s of CPU time to start, as often as there are shards and evaluations.
        parallel = self._parallel(threads or usable_cpus())
        ahead: collections.deque[concurrent.futures.Future[Batch]] = collections.deque()
        with concurrent.futures.ThreadPoolExecutor(parallel) as pool:
            try:
                for index, start in enumerate(starts.tolist()):
                    ahead.append(pool.submit(self._batch, index, start))
                    if len(ahead) == parallel + _PREFETCHED:
                        yield ahead.popleft().result()
                while ahead:
                    yield ahead.popleft().result()
            finally:
                for batch in ahead:
                    batch.cancel()
