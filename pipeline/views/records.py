"""What is known of a view: its parameters, and for a stored one its fingerprints and teacher logits."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import numpy as np

from pipeline.views.order import example_of_view
from pipeline.views.policies import ViewPolicy, draw_boxes, draw_flips, draw_ratios
from pipeline.views.source import ImageSource, LoadedImages


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViewRecords:
    """Columns over n views.

    Attributes:
      example: int64 [n].
      box: int32 [n, 4], y, x, height, width; see `policies.draw_boxes` for the pixels it counts.
      flip: bool [n].
      ratio: float32 [n], the mixup ratio.
      crop_hash, source_hash: int64 [n] in 0..2**32-1; 0 where not stored.
      stored: bool [n]; False where the parameters were drawn just now.
      logits: float32 [n, C] decoded teacher logits; zeros where not stored.
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
        """The rows int [m], in that order."""
        return ViewRecords(**{f.name: getattr(self, f.name)[rows] for f in dataclasses.fields(self)})


class RecordSource(Protocol):
    """Gives the records of any views, and the images that they are cut from."""

    num_examples: int
    num_classes: int

    def fetch(self, views: np.ndarray, source: ImageSource) -> tuple[ViewRecords, LoadedImages]:
        """Records and images of views int64 [K], duplicates allowed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampledViews:
    """Draws views: the precompute's source of records, and the online teacher's."""

    policy: ViewPolicy
    seed: int
    num_examples: int
    num_classes: int

    def fetch(self, views: np.ndarray, source: ImageSource) -> tuple[ViewRecords, LoadedImages]:
        """Implements `RecordSource`."""
        loaded = source.load(self.examples(views))
        return self.draw(views, loaded), loaded

    def examples(self, views: np.ndarray) -> np.ndarray:
        """The example of each view: int64 [n]."""
        return example_of_view(views, num_examples=self.num_examples, seed=self.seed)

    def draw(self, views: np.ndarray, loaded: LoadedImages) -> ViewRecords:
        """Parameters of views int64 [n] whose images are loaded."""
        count = len(views)
        sizes = loaded.sizes() if self.policy.name == "inception" else np.zeros((count, 2), np.int32)
        nothing = np.zeros(count, np.int64)
        return ViewRecords(
            example=loaded.examples,
            box=draw_boxes(self.policy, views, seed=self.seed, sizes=sizes),
            flip=draw_flips(self.policy, views, seed=self.seed),
            ratio=draw_ratios(self.policy, views, seed=self.seed),
            crop_hash=nothing,
            source_hash=nothing,
            stored=np.zeros(count, bool),
            logits=np.zeros((count, self.num_classes), np.float32),
        )
