"""The evaluation crop: one box per image, for teacher and student alike. `pipeline.views.render` renders it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from pipeline.errors import UserError

EVAL_KINDS = ("resize_small", "central")


def short_side_shape(sizes: np.ndarray, size: int) -> np.ndarray:
    """Height and width after `resize_short_side`: int64 [n, 2] to int64 [n, 2]."""
    sizes = np.asarray(sizes, np.int64)
    shortest = sizes.min(axis=1, keepdims=True)
    return (2 * sizes * size + shortest) // (2 * shortest)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalCrop:
    """The one crop of an image that teacher and student are evaluated on.

    Attributes:
      kind: `resize_small` (short side to round(scale * S) by area, central S x S; big_vision's evaluation) or
        `central` (central `scale` of height and width, resized to S x S; the Keras example's).
      scale: 1.25 for the paper (160 for 128), 0.875 for the Keras example.
    """

    kind: str = "resize_small"
    scale: float = 1.25

    def __post_init__(self) -> None:
        low, high = (1.0, 8.0) if self.kind == "resize_small" else (0.01, 1.0)
        if self.kind not in EVAL_KINDS or not low <= self.scale <= high:
            raise UserError(
                f"evaluation crop {self.kind} at scale {self.scale}: expected resize_small with 1 to 8 or central "
                "with 0.01 to 1"
            )

    def to_json(self) -> dict[str, Any]:
        """As the spec's identity holds it."""
        return dataclasses.asdict(self)

    def boxes(self, sizes: np.ndarray, image_size: int) -> np.ndarray:
        """Central boxes: source sizes int [n, 2] to int32 [n, 4] (y, x, height, width).

        In source pixels for `central`, in pixels of the resized image for `resize_small`.
        """
        sizes = np.asarray(sizes, np.int64)
        if self.kind == "central":
            extent = np.maximum(np.rint(sizes * self.scale).astype(np.int64), 1)
        else:
            sizes = short_side_shape(sizes, round(self.scale * image_size))
            extent = np.full_like(sizes, image_size)
        return np.concatenate([(sizes - extent) // 2, extent], axis=1).astype(np.int32)
