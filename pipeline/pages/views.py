"""Replayed views: what a student is shown, for the pages that show it to people."""

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
    """The crop of one view.

    Attributes:
      view: its index.
      example: that it is of.
      box: int32 [4], y, x, height, width.
      flipped: whether it was mirrored.
      pixels: uint8 [S, S, 3].
    """

    view: int
    example: int
    box: np.ndarray
    flipped: bool
    pixels: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplayedView:
    """One view, as the student is shown it.

    Attributes:
      own: its crop.
      partner: the crop that is mixed in.
      ratio: share of its own.
      mixed: uint8 [S, S, 3], rounded.
      logits: float64 [C], the teacher's.
    """

    own: ShownCrop
    partner: ShownCrop
    ratio: float
    mixed: np.ndarray
    logits: np.ndarray

    def tiles(self) -> np.ndarray:
        """Crop, partner's crop and mixed view side by side: uint8 [S, 3 * S, 3]."""
        return np.concatenate([self.own.pixels, self.partner.pixels, self.mixed], axis=1)


def replay_views(store: Store, dataset: Dataset, views: np.ndarray) -> Iterator[ReplayedView]:
    """Replays single views as the trainer does; both fingerprints of every crop are checked.

    Args:
      store: with the views.
      dataset: that the store was made from.
      views: int64 [n], in the order wanted.

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
