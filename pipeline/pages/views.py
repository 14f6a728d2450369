"""Single views, rendered exactly as a student sees them, for the Python API, pages and figures."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np
import tensorflow as tf

from pipeline.inputs.dataset import Dataset
from pipeline.inputs.labels import UNLABELED
from pipeline.store.replay import replay_input
from pipeline.store.view_store import ViewStore
from pipeline.views.batches import partner_views
from pipeline.views.input import Batch, ViewInput
from pipeline.views.mix import mix
from pipeline.views.records import ViewRecords


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class View:
    """One view: its parameters and the teacher's logits. Pixels and label are read when they are first used.

    Attributes:
      index: view index, `epoch * N + position`.
      example: index of its image in the split.
      box: y, x, height and width of the crop in pixels of the source image (`light`: of the resized image).
      flip: whether the crop is mirrored.
      ratio: weight of the view's own crop in the mixed view, 0..1.
      partner: index of the view that is mixed in.
      logits: teacher logits of the mixed view, float32 [C]; None if the view is not stored.
    """

    index: int
    example: int
    box: tuple[int, ...]
    flip: bool
    ratio: float
    partner: int
    logits: np.ndarray | None
    _images: ViewImages = dataclasses.field(repr=False)

    @functools.cached_property
    def label(self) -> int | None:
        """Class of the image; None if it has no label."""
        label = int(self._images.dataset.labels(np.array([self.example]))[0])
        return None if label == UNLABELED else label

    @functools.cached_property
    def _pixels(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self._images.render(self.index)

    @property
    def crop(self) -> np.ndarray:
        """The view's own crop, uint8 [S, S, 3]."""
        return self._pixels[0]

    @property
    def partner_crop(self) -> np.ndarray:
        """The crop that is mixed in, uint8 [S, S, 3]."""
        return self._pixels[1]

    @property
    def mixed(self) -> np.ndarray:
        """The mixed view that teacher and student see, float32 [S, S, 3] in 0..255."""
        return self._pixels[2]

    @property
    def source(self) -> np.ndarray:
        """The image that `box` refers to, uint8 [H, W, 3]."""
        return self._images.source(self.example)


class ViewImages:
    """Renders single views of a data set. Fingerprints of stored views are compared."""

    def __init__(self, view_input: ViewInput, dataset: Dataset) -> None:
        self.dataset = dataset
        self._input = view_input  # of batches of one view

    def render(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Crop, partner's crop and mixed view of one view.

        Raises:
          DataError: a fingerprint differs.
        """
        (batch,) = self._input.batches(np.array([index]), threads=1)
        return _pixels(batch)

    def source(self, example: int) -> np.ndarray:
        """The image that an example's boxes refer to, uint8 [H, W, 3]."""
        (encoded,) = self.dataset.read(np.array([example]))
        pixels: np.ndarray = self._input.renderer.prepare(tf.constant(encoded)).numpy()
        return pixels

    def views(self, indices: np.ndarray, records: ViewRecords) -> Iterator[View]:
        """Yields one `View` per record; without logits where they are not stored."""
        partners = partner_views(indices, num_examples=self.dataset.num_examples)
        for row in range(len(indices)):
            yield View(
                index=int(indices[row]),
                example=int(records.example[row]),
                box=tuple(records.box[row].tolist()),
                flip=bool(records.flip[row]),
                ratio=float(records.ratio[row]),
                partner=int(partners[row]),
                logits=records.logits[row] if records.stored[row] else None,
                _images=self,
            )

    def rendered(self, indices: np.ndarray, records: ViewRecords) -> Iterator[View]:
        """`views` with their pixels, from one input pipeline, whose start takes longer than a view."""
        batches = self._input.batches(indices, threads=1)
        for view, batch in zip(self.views(indices, records), batches, strict=True):
            vars(view)["_pixels"] = _pixels(batch)
            yield view


def replay_views(store: ViewStore, dataset: Dataset, indices: np.ndarray) -> Iterator[tuple[View, View]]:
    """Yields stored views, in any order, each with its partner.

    Raises:
      DataError: a fingerprint differs, or a shard is damaged.
    """
    images = ViewImages(replay_input(store, dataset, 1), dataset)
    partners = partner_views(indices, num_examples=dataset.num_examples)
    yield from zip(
        images.rendered(indices, store.views.read(indices)),
        images.views(partners, store.views.read(partners)),
        strict=True,
    )


def _pixels(batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Crop, partner's crop and mixed view of a batch of one view."""
    mixed = mix(batch["crops"], batch["partner"], batch["ratio"][:1])[0]
    return batch["crops"][0].numpy(), batch["crops"][int(batch["partner"][0])].numpy(), mixed.numpy()
