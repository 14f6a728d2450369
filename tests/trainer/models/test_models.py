"""trainer.models: properties that all students share, and refused arguments."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from pipeline.errors import UserError
from trainer.models import STUDENTS, build_student


@pytest.mark.slow
def test_every_student_scales_its_input_first() -> None:
    # One BiT is enough, because all are built by the same code.
    for name in (name for name in STUDENTS if not name.startswith("bit_") or name == "bit_r50x1"):
        with tf.Graph().as_default():  # variables without values
            scale = build_student(name, num_classes=3, image_size=32).layers[1]
        assert isinstance(scale, tf.keras.layers.Rescaling)
        np.testing.assert_allclose(scale(tf.constant([0.0, 127.5, 255.0])), [-1, 0, 1], atol=1e-6)


FLOAT32_UNDER_MIXED = {"Rescaling", "GroupNorm", "GroupNormalization", "GlobalAveragePooling2D", "Dense"}


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        *((name, "bfloat16") for name in ("tiny", "small", "resnet50v2", "bit_r50x1")),
        ("tiny", "float16"),
    ],
)
def test_low_precision_is_for_convolutions_and_never_for_sums_weights_or_logits(
    name: str, precision: str
) -> None:
    policy = tf.keras.mixed_precision.global_policy().name
    with tf.Graph().as_default():  # variables without values
        model = build_student(name, num_classes=5, image_size=32, precision=precision)
        assert (model.inputs[0].dtype, model.outputs[0].dtype) == (tf.float32, tf.float32)
    assert {variable.dtype for variable in model.weights} == {tf.float32}
    kinds = {(type(layer).__name__, layer.compute_dtype) for layer in model.layers}
    assert {kind for kind, dtype in kinds if dtype == "float32"} - {"InputLayer"} == FLOAT32_UNDER_MIXED & {
        kind for kind, _ in kinds
    }
    convolutions = [layer for layer in model.layers if "Conv2D" in type(layer).__name__]
    assert len(convolutions) >= 7
    assert {layer.compute_dtype for layer in convolutions} == {precision}
    assert tf.keras.mixed_precision.global_policy().name == policy


def test_global_policy_is_neither_heeded_nor_changed() -> None:
    before = tf.keras.mixed_precision.global_policy()
    tf.keras.mixed_precision.set_global_policy("mixed_float16")
    try:
        model = build_student("tiny", num_classes=5, image_size=32)
        assert tf.keras.mixed_precision.global_policy().name == "mixed_float16"
        assert {layer.compute_dtype for layer in model.layers} == {"float32"}
        with pytest.raises(UserError):
            build_student("resnet50v2", num_classes=5, image_size=31, precision="bfloat16")
        assert tf.keras.mixed_precision.global_policy().name == "mixed_float16"
    finally:
        tf.keras.mixed_precision.set_global_policy(before)


def test_unknown_precision_is_refused() -> None:
    with pytest.raises(UserError, match=r"`precision`=float64.*float32, bfloat16, float16"):
        build_student("tiny", num_classes=5, image_size=32, precision="float64")


def test_unknown_student_is_refused() -> None:
    with pytest.raises(UserError, match=r"vgg.*bit_r101x1, .*, resnet50v2, small, tiny"):
        build_student("vgg", num_classes=10, image_size=32)


@pytest.mark.parametrize(
    ("name", "num_classes", "image_size", "message"),
    [
        ("tiny", 0, 32, "`num_classes`=0"),
        ("tiny", 1, -1, "`image_size`=-1"),
    ],
)
def test_impossible_sizes_are_refused(name: str, num_classes: int, image_size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_student(name, num_classes=num_classes, image_size=image_size)
