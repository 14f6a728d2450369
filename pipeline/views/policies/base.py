"""The base of all view policies: what they share, and what each has to provide.

The precompute and the online teacher draw views; a replay never draws. Every draw is a function of (policy, seed, view index)
and, for some policies, of the size of the source image. All draws are vectorized over views.

A change of any draw changes the key of stored logits: it bumps `pipeline.store.spec.FORMAT_VERSION`. Only then may the golden
values in the tests change.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from pipeline.errors import UserError
from pipeline.views import keys

if TYPE_CHECKING:
    from pipeline.views.render import Renderer


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViewPolicy(abc.ABC):
    """How views are drawn and rendered.

    A policy is a subclass in a module of its own, listed in `pipeline.views.policies.POLICIES`. It provides the class attributes
    and the abstract methods below, and its parameters as dataclass fields, which `__post_init__` validates.

    Class attributes:
      name: name in flags and in the spec.
      uses_source_sizes: whether boxes, and the images that they refer to, depend on the sizes of the source images.
      any_size: whether the boxes are independent of `image_size`. If so, the same views can be rendered at any size.

    Attributes:
      image_size: S, side of a crop in pixels, 1 to 4096.
      flip_probability: probability of a horizontal flip.
      mixup: whether views are mixed; if not, every ratio is 1.
      mixup_fold: whether ratios are folded to 0.5..1 (big_vision) or stay in 0..1 (Keras example).
      mixup_block: number of consecutive views that share a ratio.

    Raises:
      UserError: a parameter is out of range.
    """

    name: ClassVar[str]
    uses_source_sizes: ClassVar[bool]
    any_size: ClassVar[bool]

    image_size: int = 128
    flip_probability: float = 0.5
    mixup: bool = True
    mixup_fold: bool = False
    mixup_block: int = 1

    def __post_init__(self) -> None:
        for name in ("image_size", "mixup_block"):
            if type(number := getattr(self, name)) is not int:
                raise UserError(f"`{name}`={number!r}: expected a whole number")
        if not 1 <= self.image_size <= 4096:
            raise UserError(f"`image_size`={self.image_size}: expected 1 to 4096 pixels")
        if not 0 <= self.flip_probability <= 1:
            raise UserError(f"`flip_probability`={self.flip_probability}: expected 0 to 1")
        if not 1 <= self.mixup_block <= 2**31:
            raise UserError(f"`mixup_block`={self.mixup_block}: expected a number of views, 1 or more")

    @abc.abstractmethod
    def draw_boxes(self, views: np.ndarray, *, seed: int, sizes: np.ndarray) -> np.ndarray:
        """Draws the box of each view.

        Args:
          views: view indices, int64 [n].
          seed: seed of the view axis.
          sizes: height and width of each view's source image in pixels, int [n, 2].

        Returns:
          int32 [n, 4]: y, x, height, width, in pixels of the image that `renderer().prepare` returns.
        """

    @abc.abstractmethod
    def renderer(self) -> Renderer:
        """The renderer of this policy's crops. It imports TensorFlow."""

    def draw_flips(self, views: np.ndarray, *, seed: int) -> np.ndarray:
        """Draws horizontal flips: views int64 [n] to bool [n]."""
        words = keys.words_of(views, keys.stream_key(seed, "flip"))[:, 0]
        return keys.unit_float64(words) < self.flip_probability

    def draw_ratios(self, views: np.ndarray, *, seed: int) -> np.ndarray:
        """Draws mixup ratios: views int64 [n] to float32 [n] in 0..1, constant over `mixup_block` views."""
        if not self.mixup:
            return np.ones(len(views), np.float32)
        blocks = np.asarray(views, np.int64) // self.mixup_block
        words = keys.words_of(blocks, keys.stream_key(seed, "mixup"))[:, 0]
        # With 24 bits, each float64 is exactly a float32, and rounding never reaches 1.
        ratios = ((words >> np.uint64(40)).astype(np.float64) * 2.0**-24).astype(np.float32)
        return np.maximum(ratios, np.float32(1) - ratios) if self.mixup_fold else ratios

    def to_json(self) -> dict[str, Any]:
        """The policy as JSON, as in the spec's identity: parameters without effect are left out."""
        unused = [] if self.mixup else ["mixup_fold", "mixup_block"]
        fields = {"name": self.name, **dataclasses.asdict(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items() if k not in unused}

    def axis_json(self) -> dict[str, Any]:
        """`to_json` without what does not determine views."""
        fields = self.to_json()
        if self.any_size:
            del fields["image_size"]
        return fields
