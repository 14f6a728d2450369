"""Replays single views for pages and figures, exactly as a student sees them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from pipeline.inputs.dataset import Dataset
from pipeline.store.reader import Store
from pipeline.views.input import Batch, ViewInput
from pipeline.views.mix import mix
from pipeline.views.source import ImageSource


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShownCrop:
    """The crop of a view.

    Attributes:
      view: view index.
      example: example index.
      box: y, x, height, width; int32 [4].
      flipped: whether the crop is mirrored.
      pixels: crop, uint8 [S, S, 3].
    """

    view: int
    example: int
    box: np.ndarray
    flipped: bool
    pixels: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplayedView:
    """A view as the student sees it.

    Attributes:
      own: crop of the view.
      partner: crop of the partner.
      ratio: mixup ratio, the share of `own`.
      mixed: mixed view, rounded to uint8 [S, S, 3].
      logits: stored teacher logits, float64 [C].
    """

    own: ShownCrop
    partner: ShownCrop
    ratio: float
    mixed: np.ndarray
    logits: np.ndarray

    def tiles(self) -> np.ndarray:
        """Crop, partner's crop and mixed view side by side, uint8 [S, 3 * S, 3]."""
        return np.concatenate([self.own.pixels, self.partner.pixels, self.mixed], axis=1)


def replay_views(store: Store, dataset: Dataset, views: np.ndarray) -> Iterator[ReplayedView]:
    """Replays views and checks both fingerprints of every crop, as the trainer does.

    Args:
      store: the store.
      dataset: data set of the store.
      views: view indices, int64 [n], in any order.

    Raises:
      DataError: a fingerprint differs, or a shard is damaged.
    """
    source = ImageSource(dataset, store.spec.policy.renderer())
    for batch in ViewInput(store.views, source, 1).batches(views, threads=1):
        mixed = mix(batch["crops"], batch["partner"], batch["ratio"][:1]).numpy()[0]
        yield ReplayedView(
            own=_shown(batch, 0),
            partner=_shown(batch, int(batch["partner"][0])),
            ratio=float(batch["ratio"][0]),
            mixed=np.clip(mixed.round(), 0, 255).astype(np.uint8),
            logits=batch["logits"].numpy()[0].astype(np.float64),
        )


def _shown(batch: Batch, slot: int) -> ShownCrop:
    return ShownCrop(
        view=int(batch["views"][slot]),
        example=int(batch["example"][slot]),
        box=batch["box"][slot].numpy(),
        flipped=bool(batch["flip"][slot]),
        pixels=batch["crops"][slot].numpy(),
    )
