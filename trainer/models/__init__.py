"""Students by name.

Every student takes the view as it is, `image` float32 [B, S, S, 3] in 0..255, scales it inside, and returns
float32 logits [B, C].
"""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf

from pipeline.errors import UserError
from trainer.models.bit import BIT_MODELS
from trainer.models.resnet50v2 import resnet50v2
from trainer.models.small import small, tiny

# name -> builder(num_classes, image_size)
STUDENTS: dict[str, Callable[[int, int], tf.keras.Model]] = {
    "tiny": tiny,
    "small": small,
    "resnet50v2": resnet50v2,
    **BIT_MODELS,
}


def build(name: str, *, num_classes: int, image_size: int) -> tf.keras.Model:
    """Builds the student `name` with fresh weights from TensorFlow's global seed.

    Args:
      name: a key of `STUDENTS`.
      num_classes: C, >= 1.
      image_size: S in pixels, >= 1 (>= 32 for ResNet50V2).

    Returns:
      A model from `image` float32 [B, S, S, 3] in 0..255 to float32 logits [B, C].

    Raises:
      UserError: if there is no such student, or a number is out of range.
    """
    if name not in STUDENTS:
        raise UserError(f"no student is named {name!r}; choose one of {', '.join(sorted(STUDENTS))}")
    for what, value in (("num_classes", num_classes), ("image_size", image_size)):
        if value < 1:
            raise UserError(f"{what} must be >= 1; got {value}")
    return STUDENTS[name](num_classes, image_size)
