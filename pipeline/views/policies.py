"""View policies: the numbers from which boxes, flips and mixup ratios are drawn, and the drawing.

Used by the precompute and by the online teacher; a replay never draws. Everything is a function of
(policy, seed, view index) and, for `inception`, of the source image's size, vectorised over views.

Changing any draw changes what stored logits are keyed by: it bumps `pipeline.store.spec.FORMAT_VERSION`,
and only then may the golden values in the tests change.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from pipeline.errors import UserError
from pipeline.views import keys

POLICIES = ("inception", "light")
ATTEMPTS = 100  # of tf.image.sample_distorted_bounding_box, its max_attempts
# Aspect ratio and height, then y and x, in TF's order: one Philox block an attempt.
_CHUNK = 1024  # views drawn at a time: 100 attempts x 4 words x 8 bytes x 1024 = 3.3 MB


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViewPolicy:
    """How views are drawn.

    Attributes:
      name: `inception` (random area and aspect, Szegedy et al. 2015; the paper's) or `light` (random
        window of the resized image; the Keras example's).
      image_size: S, side of a crop in pixels.
      area_range: box area as a share of the image, `inception` only. Paper: 5 % to 100 %.
      aspect_range: box width / height, `inception` only. TF's default: 3/4 to 4/3.
      light_scale: `light` resizes to round(light_scale * S) squared. Keras example: 160 for 128.
      flip_probability: of a horizontal flip.
      mixup: whether views are mixed; without, the ratio is 1.
      mixup_fold: fold the ratio to 0.5..1 (big_vision) instead of leaving it in 0..1 (Keras example).
      mixup_block: consecutive views that share a ratio.
    """

    name: str = "inception"
    image_size: int = 128
    area_range: tuple[float, float] = (0.05, 1.0)
    aspect_range: tuple[float, float] = (3 / 4, 4 / 3)
    light_scale: float = 1.25
    flip_probability: float = 0.5
    mixup: bool = True
    mixup_fold: bool = False
    mixup_block: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "area_range", tuple(map(float, self.area_range)))
        object.__setattr__(self, "aspect_range", tuple(map(float, self.aspect_range)))
        for number in (self.image_size, self.mixup_block):
            if type(number) is not int:
                raise UserError(f"{number!r}: expected a whole number of pixels or views")
        if self.name not in POLICIES:
            raise UserError(f"--policy={self.name}: expected one of {', '.join(POLICIES)}")
        if not 1 <= self.image_size <= 4096:
            raise UserError(f"--image_size={self.image_size}: expected 1 to 4096 pixels")
        low, high = self.area_range
        if not 0 < low <= high <= 1:
            raise UserError(f"--area_range={low},{high}: expected 0 < low <= high <= 1 (shares of the image)")
        low, high = self.aspect_range
        if not 0 < low <= high < math.inf:
            raise UserError(f"aspect range {low}..{high}: expected finite 0 < low <= high")
        if not 1 <= self.light_scale <= 8:
            raise UserError(f"light_scale {self.light_scale}: expected 1 to 8")
        if not 0 <= self.flip_probability <= 1:
            raise UserError(f"flip_probability {self.flip_probability}: expected 0 to 1")
        if not 1 <= self.mixup_block <= 2**31:
            raise UserError(f"--mixup_block={self.mixup_block}: expected a number of views, 1 or more")

    @property
    def canvas_size(self) -> int:
        """Side of the image that `light` cuts its window from, in pixels."""
        return round(self.light_scale * self.image_size)

    def to_json(self) -> dict[str, Any]:
        """The policy's numbers as the spec's identity holds them: those that have an effect."""
        fields = dataclasses.asdict(self)
        unused = ["light_scale"] if self.name == "inception" else ["area_range", "aspect_range"]
        unused += [] if self.mixup else ["mixup_fold", "mixup_block"]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items() if k not in unused}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> ViewPolicy:
        """The inverse of `to_json`."""
        return cls(**fields)


def draw_ratios(policy: ViewPolicy, views: np.ndarray, *, seed: int) -> np.ndarray:
    """Mixup ratios: views int64 [n] to float32 [n] in 0..1, constant over a block of `mixup_block` views."""
    if not policy.mixup:
        return np.ones(len(views), np.float32)
    blocks = np.asarray(views, np.int64) // policy.mixup_block
    words = _words_of(blocks, keys.stream_key(seed, "mixup"), blocks_each=1)[:, 0]
    # 24 bits, so that the float64 is a float32 exactly and 1 is never reached by rounding.
    ratios = ((words >> np.uint64(40)).astype(np.float64) * 2.0**-24).astype(np.float32)
    return np.maximum(ratios, np.float32(1) - ratios) if policy.mixup_fold else ratios


def draw_flips(policy: ViewPolicy, views: np.ndarray, *, seed: int) -> np.ndarray:
    """Horizontal flips: views int64 [n] to bool [n]."""
    words = _words_of(np.asarray(views, np.int64), keys.stream_key(seed, "flip"), blocks_each=1)[:, 0]
    return keys.unit_float64(words) < policy.flip_probability


def draw_boxes(policy: ViewPolicy, views: np.ndarray, *, seed: int, sizes: np.ndarray) -> np.ndarray:
    """Boxes.

    Args:
      policy: the view policy.
      views: int64 [n].
      seed: the spec's seed.
      sizes: int [n, 2], (height, width) of each view's source image in pixels; unused by `light`.

    Returns:
      int32 [n, 4]: y, x, height, width; in source pixels for `inception`, in pixels of the resized image
      for `light`.
    """
    views = np.asarray(views, np.int64)
    if policy.name == "light":
        words = _words_of(views, keys.stream_key(seed, "window"), blocks_each=1)
        room = np.array(policy.canvas_size - policy.image_size + 1)
        corners = keys.below(words[:, :2], room)
        return np.concatenate([corners, np.full_like(corners, policy.image_size)], 1).astype(np.int32)
    key = keys.stream_key(seed, "box")
    boxes = np.empty((len(views), 4), np.int32)
    for start in range(0, len(views), _CHUNK):
        part = slice(start, start + _CHUNK)
        words = _words_of(views[part], key, blocks_each=ATTEMPTS)
        boxes[part] = _distorted_boxes(policy, words.reshape(-1, ATTEMPTS, 4), np.asarray(sizes)[part])
    return boxes


def _words_of(elements: np.ndarray, key: np.ndarray, *, blocks_each: int) -> np.ndarray:
    """Words of elements int64 [n] in any order: uint64 [n, 4 * blocks_each]; one call a consecutive run."""
    out = np.empty((len(elements), blocks_each * keys.WORDS_PER_BLOCK), np.uint64)
    distinct, inverse = np.unique(elements, return_inverse=True)
    rows = np.empty((len(distinct), out.shape[1]), np.uint64)
    starts = np.flatnonzero(np.diff(distinct, prepend=-2) != 1)
    for start, stop in zip(starts, [*starts[1:], len(distinct)], strict=True):
        rows[start:stop] = keys.random_words(key, int(distinct[start]), int(stop - start), blocks=blocks_each)
    out[:] = rows[inverse]
    return out


def _round(values: np.ndarray) -> np.ndarray:
    """To the nearest integer, halves to even, as C's lrint: float64 [...] to int64 [...]."""
    return np.rint(values).astype(np.int64)


def _distorted_boxes(policy: ViewPolicy, words: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The box of tf.image.sample_distorted_bounding_box with `min_object_covered=0`.

    TF's rule, in float64: an aspect ratio, then a height among those whose area may fit, a width from the
    two, one pixel of mending where rounding left the area outside the range, then a corner. The first of
    `ATTEMPTS` attempts that fits is taken, else the whole image. (TF never draws the last corner position,
    `Uniform(H - h)`; here all H - h + 1 are possible.)

    Args:
      policy: `inception` and its numbers.
      words: uint64 [n, attempts, 4].
      sizes: int [n, 2] height and width.

    Returns:
      int64 [n, 4] y, x, height, width.
    """
    image_h = sizes[:, 0].astype(np.int64)[:, None]
    image_w = sizes[:, 1].astype(np.int64)[:, None]
    min_area = policy.area_range[0] * image_h * image_w
    max_area = policy.area_range[1] * image_h * image_w
    low, high = policy.aspect_range
    aspect = low + (high - low) * keys.unit_float64(words[..., 0])  # [n, attempts], as all below

    least = _round(np.sqrt(min_area / aspect))
    most = _round(np.sqrt(max_area / aspect))
    # The largest height whose width still fits; a pixel less where rounding missed.
    too_wide = _round(most * aspect) > image_w
    most = np.where(too_wide, ((image_w + 0.5 - 1e-7) / aspect).astype(np.int64), most)
    most -= too_wide & (_round(most * aspect) > image_w)
    most = np.minimum(most, image_h)
    least = np.minimum(least, most)
    height = least + keys.below(words[..., 1], most - least + 1)
    width = _round(height * aspect)
    for outside, step in ((lambda area: area < min_area, 1), (lambda area: area > max_area, -1)):
        mend = outside(height * width)
        height = np.where(mend, height + step, height)
        width = np.where(mend, _round(height * aspect), width)
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
