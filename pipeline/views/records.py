"""Records of views: parameters, and for stored views also fingerprints and teacher logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

import numpy as np

from pipeline.views.batches import EXTRA_CROPS
from pipeline.views.eval_crop import EvalCrop
from pipeline.views.order import example_of_view
from pipeline.views.policies.base import ViewPolicy
from pipeline.views.source import ImageSource, LoadedImages

NO_FINGERPRINT = -1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViewRecords:
    """Columns over n views.

    Attributes:
      example: int64 [n].
      box: int32 [n, 4], y, x, height, width; see `ViewPolicy.draw_boxes` for the pixels that it refers to.
      flip: bool [n].
      ratio: float32 [n], the mixup ratio.
      crop_hash, source_hash: int64 [n] fingerprints in 0..2**32-1; 0 if not stored. A crop_hash is `NO_FINGERPRINT` if the store
        has crops of another size.
      stored: bool [n]; False if the parameters were drawn instead of read.
      logits: float32 [n, C] decoded teacher logits; zeros if not stored.
    """

    example: np.ndarray
    box: np.ndarray
    flip: np.ndarray
    ratio: np.ndarray
    crop_hash: np.ndarray
    source_hash: np.ndarray
    stored: np.ndarray
    logits: np.ndarray

    def take(self, rows: np.ndarray) -> ViewRecords:
        """Selects rows int [m], in this order."""
        return ViewRecords(**{f.name: getattr(self, f.name)[rows] for f in dataclasses.fields(self)})


class RecordSource(Protocol):
    """Returns records of views and the images that they are cropped from."""

    @property
    def num_examples(self) -> int:
        """N, number of examples."""

    @property
    def num_classes(self) -> int:
        """C, number of classes."""

    def fetch(self, views: np.ndarray, source: ImageSource) -> tuple[ViewRecords, LoadedImages]:
        """Records and images of views int64 [K]; duplicates are allowed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampledViews:
    """Draws views, for the precompute and the online teacher."""

    policy: ViewPolicy
    seed: int
    num_examples: int
    num_classes: int

    def fetch(self, views: np.ndarray, source: ImageSource) -> tuple[ViewRecords, LoadedImages]:
        loaded = source.load(self.examples(views))
        return self.draw(views, loaded), loaded

    def examples(self, views: np.ndarray) -> np.ndarray:
        """The example of each view: int64 [n]."""
        return example_of_view(views, num_examples=self.num_examples, seed=self.seed)

    def draw(self, views: np.ndarray, loaded: LoadedImages) -> ViewRecords:
        """Draws the parameters of views int64 [n] whose images are loaded."""
        sizes = loaded.sizes() if self.policy.uses_source_sizes else np.zeros((len(views), 2), np.int32)
        return _unstored(
            loaded.examples,
            box=self.policy.draw_boxes(views, seed=self.seed, sizes=sizes),
            flip=self.policy.draw_flips(views, seed=self.seed),
            ratio=self.policy.draw_ratios(views, seed=self.seed),
            num_classes=self.num_classes,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalViews:
    """Evaluation crops of a split's examples in order: views without randomness or mixup."""

    eval_crop: EvalCrop
    image_size: int
    num_examples: int
    num_classes: int

    def fetch(self, views: np.ndarray, source: ImageSource) -> tuple[ViewRecords, LoadedImages]:
        """Implements `RecordSource`; view `v` is example `v`."""
        loaded = source.load(views)
        count = len(views)
        return _unstored(
            views,
            box=self.eval_crop.boxes(loaded.sizes(), self.image_size),
            flip=np.zeros(count, bool),
            ratio=np.ones(count, np.float32),
            num_classes=self.num_classes,
        ), loaded


def eval_planner(batch_size: int, *, num_examples: int) -> Callable[[int], tuple[np.ndarray, np.ndarray]]:
    """A `ViewInput.plan` for views without mixup: each is its own partner, and the last one is repeated past the end."""

    def plan(start: int) -> tuple[np.ndarray, np.ndarray]:
        views = np.minimum(np.arange(start, start + batch_size + EXTRA_CROPS), num_examples - 1)
        # The slots for partners outside the batch are unused; they repeat one image, which is read once.
        views[batch_size:] = views[batch_size - 1]
        return views.astype(np.int64), np.arange(batch_size, dtype=np.int32)

    return plan


def _unstored(
    examples: np.ndarray, *, box: np.ndarray, flip: np.ndarray, ratio: np.ndarray, num_classes: int
) -> ViewRecords:
    return ViewRecords(
        example=examples,
        box=box,
        flip=flip,
        ratio=ratio,
        crop_hash=np.zeros(len(examples), np.int64),
        source_hash=np.zeros(len(examples), np.int64),
        stored=np.zeros(len(examples), bool),
        logits=np.zeros((len(examples), num_classes), np.float32),
    )
