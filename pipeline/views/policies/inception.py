"""The `inception` policy: boxes of random area and aspect ratio (Szegedy et al. 2015), as in the paper."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from pipeline.errors import UserError
from pipeline.views import keys
from pipeline.views.policies.base import ViewPolicy

if TYPE_CHECKING:
    from pipeline.views.render import Renderer

# max_attempts of tf.image.sample_distorted_bounding_box. Each attempt takes one Philox block: aspect ratio, height, y, x.
ATTEMPTS = 100
_CHUNK = 1024  # views drawn at a time: 100 attempts x 4 words x 8 bytes x 1024 = 3.3 MB


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inception(ViewPolicy):
    """Random boxes of the source image. Boxes are in source pixels, so views can be rendered at any size.

    Attributes:
      area_range: smallest and largest box area as a share of the image. Paper: 5 % to 100 %.
      aspect_range: smallest and largest box width / height. TF's default: 3/4 to 4/3.
    """

    name: ClassVar[str] = "inception"
    uses_source_sizes: ClassVar[bool] = True
    any_size: ClassVar[bool] = True

    area_range: tuple[float, float] = (0.05, 1.0)
    aspect_range: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "area_range", tuple(map(float, self.area_range)))
        object.__setattr__(self, "aspect_range", tuple(map(float, self.aspect_range)))
        low, high = self.area_range
        if not 0 < low <= high <= 1:
            raise UserError(f"`area_range`={low},{high}: expected 0 < low <= high <= 1 (shares of the image)")
        low, high = self.aspect_range
        if not 0 < low <= high < math.inf:
            raise UserError(f"`aspect_range`={low},{high}: expected finite 0 < low <= high")

    def draw_boxes(self, views: np.ndarray, *, seed: int, sizes: np.ndarray) -> np.ndarray:
        key = keys.stream_key(seed, "box")
        boxes = np.empty((len(views), 4), np.int32)
        for start in range(0, len(views), _CHUNK):
            part = slice(start, start + _CHUNK)
            words = keys.words_of(views[part], key, blocks=ATTEMPTS)
            boxes[part] = self._distorted_boxes(words.reshape(-1, ATTEMPTS, 4), np.asarray(sizes)[part])
        return boxes

    def renderer(self) -> Renderer:
        from pipeline.views.render import BoxRenderer

        return BoxRenderer(self.image_size)

    def _distorted_boxes(self, words: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Boxes of tf.image.sample_distorted_bounding_box with `min_object_covered=0`.

        TF's rule, in float64: draw an aspect ratio, then a height among those whose area may fit, and compute the width. If
        rounding left the area outside the range, change the height by one pixel. Then draw a corner. The first of `ATTEMPTS`
        attempts that fits is used, or else the whole image. TF never draws the last corner position (`Uniform(H - h)`); here
        all H - h + 1 positions are possible.

        Args:
          words: random words, uint64 [n, attempts, 4].
          sizes: height and width of the source images, int [n, 2].

        Returns:
          int64 [n, 4]: y, x, height, width.
        """
        image_h = sizes[:, 0].astype(np.int64)[:, None]
        image_w = sizes[:, 1].astype(np.int64)[:, None]
        min_area = self.area_range[0] * image_h * image_w
        max_area = self.area_range[1] * image_h * image_w
        low, high = self.aspect_range
        aspect = low + (high - low) * keys.unit_float64(words[..., 0])  # [n, attempts], as everything below

        least = _round(np.sqrt(min_area / aspect))
        most = _round(np.sqrt(max_area / aspect))
        # The largest height whose width still fits; one pixel less where rounding missed.
        too_wide = _round(most * aspect) > image_w
        most = np.where(too_wide, ((image_w + 0.5 - 1e-7) / aspect).astype(np.int64), most)
        most -= too_wide & (_round(most * aspect) > image_w)
        most = np.minimum(most, image_h)
        least = np.minimum(least, most)
        height = least + keys.below(words[..., 1], most - least + 1)
        width = _round(height * aspect)
        for outside, step in ((lambda area: area < min_area, 1), (lambda area: area > max_area, -1)):
            changed = outside(height * width)
            height = np.where(changed, height + step, height)
            width = np.where(changed, _round(height * aspect), width)
        area = height * width
        fits = (area >= min_area) & (area <= max_area)
        fits &= (height <= image_h) & (width <= image_w) & (height > 0) & (width > 0)

        first = np.argmax(fits, axis=1)
        rows = np.arange(len(sizes))
        found = fits[rows, first]
        height = np.where(found, height[rows, first], image_h[:, 0])
        width = np.where(found, width[rows, first], image_w[:, 0])
        y = keys.below(words[rows, first, 2], image_h[:, 0] - height + 1)
        x = keys.below(words[rows, first, 3], image_w[:, 0] - width + 1)
        return np.stack([y, x, height, width], axis=1)


def _round(values: np.ndarray) -> np.ndarray:
    """Rounds half to even, as C's lrint: float64 [...] to int64 [...]."""
    return np.rint(values).astype(np.int64)
