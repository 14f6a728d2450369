"""The crops that a batch of consecutive views needs, and the partner of each view.

The partner of a view is the next position of the same epoch, cyclically. This is big_vision's roll-by-one over the epoch instead of
the batch, so it does not depend on the batch. Consecutive views share crops: `B` views need `B + 2` crops, not `2 * B`.
"""

from __future__ import annotations

import numpy as np

EXTRA_CROPS = 2  # of the next view, and of position 0 of the epoch


def partner_views(views: np.ndarray, *, num_examples: int) -> np.ndarray:
    """Partner of each view: int64 [...] to int64 [...]. With one example, it is the view itself."""
    views = np.asarray(views, np.int64)
    last = views % num_examples == num_examples - 1
    return np.where(last, views - (num_examples - 1), views + 1)


def plan_batch(start: int, batch_size: int, *, num_examples: int) -> tuple[np.ndarray, np.ndarray]:
    """The views whose crops the batch `start .. start + B - 1` is mixed from.

    At most two partners are outside the batch: the view after the last one, if the batch does not end with its epoch, and position
    0 of the first epoch, if the batch starts later in this epoch and crosses its end. Epochs inside the batch (N < B) contain
    their own position 0.

    Args:
      start: index of the first view, 0 or more.
      batch_size: B, 1 or more.
      num_examples: N.

    Returns:
      views: int64 [B + 2]. The first B are the batch; unused slots repeat the last used one.
      partner: int32 [B], in 0..B+1: index in `views` of the partner of each of the first B views.
    """
    batch = np.arange(start, start + batch_size, dtype=np.int64)
    wanted = partner_views(batch, num_examples=num_examples)
    partner = wanted - start
    outside = (partner < 0) | (partner >= batch_size)
    extra, slot = np.unique(wanted[outside], return_inverse=True)
    partner[outside] = batch_size + slot
    views = np.concatenate([batch, extra])
    padding = np.repeat(views[-1:], batch_size + EXTRA_CROPS - len(views))
    return np.concatenate([views, padding]), partner.astype(np.int32)
