"""Students: built-in ones by name, those of `tf.keras.applications`, and the user's own.

Every student takes views as they are, `image` float32 [B, S, S, 3] in 0..255, scales them itself, and returns float32
logits [B, C] at any precision.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import tensorflow as tf

from pipeline.errors import UserError
from trainer.config.choices import KERAS_PREFIX, student_kind
from trainer.models.bit import BIT_MODELS
from trainer.models.checks import checked_student
from trainer.models.keras_applications import keras_application
from trainer.models.layers import seeded_layers
from trainer.models.own import student_from_function, student_from_path
from trainer.models.resnet50v2 import resnet50v2
from trainer.models.small import small, tiny

# name -> builder(num_classes, image_size)
STUDENTS: dict[str, Callable[[int, int], tf.keras.Model]] = {
    "tiny": tiny,
    "small": small,
    "resnet50v2": resnet50v2,
    **BIT_MODELS,
}

# Values of `--precision`, and Keras's policy for each. Under `mixed_bfloat16`, convolutions and the layers between them
# are bfloat16. Weights, the scaling of views, the moments of all norms, the standardization of kernels, the pooling
# before the head, and the head itself stay float32, because they sum over thousands of numbers, too many for a mantissa
# of 8 bits. `mixed_float16` is the same with float16. bfloat16 has the range of float32, so the loss needs no scaling;
# float16 needs it (`trainer.step.loss_scaling`).
PRECISIONS = {"float32": "float32", "bfloat16": "mixed_bfloat16", "float16": "mixed_float16"}


# Image sizes from which a step of the student takes about twice as long as one of `small`, although that has more
# parameters: the student's first block runs at half the resolution, that of `small` at a quarter.
_SLOW_FROM = {"tiny": 64}


def size_notice(name: str, image_size: int) -> str | None:
    """A notice that another student is faster at this image size; None if there is none."""
    if image_size < _SLOW_FROM.get(name, math.inf):
        return None
    return (
        f"{name} is designed for 32 x 32 images; at {image_size} x {image_size}, a step of --student=small takes about "
        "half the time"
    )


def build_student(
    student: str, *, num_classes: int, image_size: int, precision: str = "float32"
) -> tf.keras.Model:
    """Builds a student. Fresh weights are drawn from TensorFlow's global seed.

    Keras's global policy is neither used nor changed.

    Args:
      student: a key of `STUDENTS`, such as "small" or "bit_r50x1"; "keras:NAME", such as "keras:MobileNetV3Small";
        "module:function", a function `(num_classes, image_size) -> tf.keras.Model`; or the path of a `.keras` file or
        Keras SavedModel, which is loaded with its weights.
      num_classes: C, >= 1.
      image_size: S in pixels, >= 1 (>= 32 for most models of Keras).
      precision: A key of `PRECISIONS`. The weights are float32 and, for one seed, equal at any precision. A saved model has
        its own precision and takes float32 only.

    Returns:
      A model from float32 [B, S, S, 3] in 0..255 to float32 logits [B, C].

    Raises:
      UserError: there is no such student or precision, a number is out of range, or the student is not such a model.
    """
    kind = student_kind(student)
    for what, value in (("num_classes", num_classes), ("image_size", image_size)):
        if value < 1:
            raise UserError(f"`{what}`={value}: expected 1 or more")
    if precision not in PRECISIONS:
        raise UserError(f"`precision`={precision}: expected one of {', '.join(PRECISIONS)}")
    policy = PRECISIONS[precision]
    if kind == "keras":
        with _policy_scope("float32"), seeded_layers():
            return keras_application(
                student.removeprefix(KERAS_PREFIX), num_classes, image_size, policy=policy
            )
    with _policy_scope(policy), seeded_layers():
        if kind == "built-in":
            return STUDENTS[student](num_classes, image_size)
        if kind == "function":
            model = student_from_function(student, num_classes, image_size)
        else:
            model = student_from_path(student, precision=precision)
        return checked_student(model, name=student, num_classes=num_classes, image_size=image_size)


@contextlib.contextmanager
def _policy_scope(policy: str) -> Iterator[None]:
    """Sets Keras's global policy for the layers created inside; those of `tf.keras.applications` take no `dtype`."""
    before = tf.keras.mixed_precision.global_policy()
    tf.keras.mixed_precision.set_global_policy(policy)
    try:
        yield
    finally:
        tf.keras.mixed_precision.set_global_policy(before)
