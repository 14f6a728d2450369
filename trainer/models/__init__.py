"""Students by name.

Every student takes the view as it is, `image` float32 [B, S, S, 3] in 0..255, scales it inside, and returns
float32 logits [B, C], whatever its precision.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

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

# What `--precision` may be -> Keras's policy for it. Under `mixed_bfloat16` convolutions and what lies between them
# are bfloat16. Weights, the scaling of views, the moments of all norms, the standardisation of kernels, the pooling
# before the head and the head itself are float32: sums over thousands of numbers, which 8 bits cannot hold. bfloat16
# has float32's range, so that no loss needs scaling.
PRECISIONS = {"float32": "float32", "bfloat16": "mixed_bfloat16"}


# Image sizes from which on a step of the student takes about twice as long as one of `small`, which has more
# parameters: its first block works at half the resolution, that of `small` at a quarter.
_SLOW_FROM = {"tiny": 64}


def size_notice(name: str, image_size: int) -> str | None:
    """The line before a run with a student that another one beats in speed at this image size; None if there is none.

    Args:
      name: of the student.
      image_size: S in pixels.
    """
    if image_size < _SLOW_FROM.get(name, math.inf):
        return None
    return (
        f"{name} is meant for 32 x 32 images; at {image_size} x {image_size} --student=small takes about half the time per "
        "step"
    )


def build(name: str, *, num_classes: int, image_size: int, precision: str = "float32") -> tf.keras.Model:
    """Builds the student `name` with fresh weights from TensorFlow's global seed.

    Keras's global policy is neither heeded nor changed.

    Args:
      name: a key of `STUDENTS`.
      num_classes: C, >= 1.
      image_size: S in pixels, >= 1 (>= 32 for ResNet50V2).
      precision: a key of `PRECISIONS`. The weights are float32, and the same for one seed, with any.

    Returns:
      A model from `image` float32 [B, S, S, 3] in 0..255 to float32 logits [B, C].

    Raises:
      UserError: if there is no such student or precision, or a number is out of range.
    """
    if name not in STUDENTS:
        raise UserError(f"no student is named {name!r}; choose one of {', '.join(sorted(STUDENTS))}")
    for what, value in (("num_classes", num_classes), ("image_size", image_size)):
        if value < 1:
            raise UserError(f"{what} must be >= 1; got {value}")
    if precision not in PRECISIONS:
        raise UserError(f"--precision={precision}: expected one of {', '.join(PRECISIONS)}")
    with _policy_scope(PRECISIONS[precision]):
        return STUDENTS[name](num_classes, image_size)


@contextlib.contextmanager
def _policy_scope(policy: str) -> Iterator[None]:
    """Layers made inside have the policy, those of `tf.keras.applications` too, which take no `dtype`."""
    before = tf.keras.mixed_precision.global_policy()
    tf.keras.mixed_precision.set_global_policy(policy)
    try:
        yield
    finally:
        tf.keras.mixed_precision.set_global_policy(before)
