"""The evaluation crop: one box per image, the same for teacher and student. `pipeline.views.render` renders it."""

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
    """The crop of an image on which teacher and student are evaluated.

    Attributes:
      kind: `resize_small` (resize the short side to round(scale * S) by area, then take the central S x S; as in big_vision) or
        `central` (take the central `scale` of height and width, then resize to S x S; as in the Keras example).
      scale: 1.25 in the paper (160 for 128), 0.875 in the Keras example.

    Raises:
      UserError: the kind is unknown, or the scale is out of range.
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
        """The crop as JSON, as in the spec's identity."""
        return dataclasses.asdict(self)

    def boxes(self, sizes: np.ndarray, image_size: int) -> np.ndarray:
        """Boxes of evaluation crops.

        Args:
          sizes: height and width of the source images in pixels, int [n, 2].
          image_size: S, side of a crop in pixels.

        Returns:
          int32 [n, 4]: y, x, height, width, in source pixels for `central`, in pixels of the resized image for `resize_small`.
        """
        sizes = np.asarray(sizes, np.int64)
        if self.kind == "central":
            extent = np.maximum(np.rint(sizes * self.scale).astype(np.int64), 1)
        else:
            sizes = short_side_shape(sizes, round(self.scale * image_size))
            extent = np.full_like(sizes, image_size)
        return np.concatenate([(sizes - extent) // 2, extent], axis=1).astype(np.int32)
