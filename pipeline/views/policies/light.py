"""The `light` policy: random windows of the resized image, as in the Keras example."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from pipeline.errors import UserError
from pipeline.views import keys
from pipeline.views.policies.base import ViewPolicy

if TYPE_CHECKING:
    from pipeline.views.render import Renderer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Light(ViewPolicy):
    """Random S x S windows of a canvas, the image resized to a square. Boxes are in canvas pixels, so views have one size.

    Attributes:
      light_scale: side of the canvas / S, 1 to 8. Keras example: 160 / 128.
    """

    name: ClassVar[str] = "light"
    uses_source_sizes: ClassVar[bool] = False
    any_size: ClassVar[bool] = False

    light_scale: float = 1.25

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.light_scale <= 8:
            raise UserError(f"`light_scale`={self.light_scale}: expected 1 to 8")

    @property
    def canvas_size(self) -> int:
        """Side of the canvas in pixels."""
        return round(self.light_scale * self.image_size)

    def draw_boxes(self, views: np.ndarray, *, seed: int, sizes: np.ndarray) -> np.ndarray:
        del sizes
        words = keys.words_of(views, keys.stream_key(seed, "window"))
        corners = keys.below(words[:, :2], np.array(self.canvas_size - self.image_size + 1))
        return np.concatenate([corners, np.full_like(corners, self.image_size)], 1).astype(np.int32)

    def renderer(self) -> Renderer:
        from pipeline.views.render import WindowRenderer, resize_bilinear

        return WindowRenderer(
            self.image_size,
            lambda image: resize_bilinear(image, self.canvas_size),
            lambda sizes: np.full_like(sizes, self.canvas_size),
        )
