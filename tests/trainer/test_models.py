"""trainer.models: published sizes, the 0..255 contract, and a SavedModel round trip."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest
import tensorflow as tf

from pipeline.errors import UserError
from trainer.models import STUDENTS, build


def pictures(count: int, size: int) -> tf.Tensor:
    """float32 [count, size, size, 3] in 0..255."""
    return tf.constant(np.random.default_rng(0).uniform(0, 255, (count, size, size, 3)).astype(np.float32))


@pytest.mark.parametrize(
    ("name", "num_classes", "image_size", "parameters"),
    [
        ("tiny", 10, 32, 77_850),
        ("small", 102, 128, 457_526),
        ("resnet50v2", 102, 128, 23_773_798),  # DESIGN section 8
    ],
)
def test_parameter_counts_and_shapes(name: str, num_classes: int, image_size: int, parameters: int) -> None:
    model = build(name, num_classes=num_classes, image_size=image_size)
    assert model.count_params() == parameters
    assert model.input_names == ["image"]
    assert model.input_shape == (None, image_size, image_size, 3)
    assert model.layers[-1].dtype == "float32"
    logits = model(pictures(2, image_size))
    assert (logits.shape, logits.dtype) == ((2, num_classes), tf.float32)
    assert np.all(np.isfinite(logits))


def test_every_student_scales_its_input_first() -> None:
    # One BiT is enough: all are built alike.
    for name in (name for name in STUDENTS if not name.startswith("bit_") or name == "bit_r50x1"):
        with tf.Graph().as_default():  # variables without values
            scale = build(name, num_classes=3, image_size=32).layers[1]
        assert isinstance(scale, tf.keras.layers.Rescaling)
        np.testing.assert_allclose(scale(tf.constant([0.0, 127.5, 255.0])), [-1, 0, 1], atol=1e-6)


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_value_range(name: str) -> None:
    """A picture in 0..1 is taken for an almost black one."""
    model = build(name, num_classes=10, image_size=32)
    picture = pictures(1, 32)
    difference = np.abs(model(picture) - model(picture / 255)).max()
    assert difference > 10 * np.abs(model(picture / 255) - model(tf.zeros_like(picture))).max()


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_logits_do_not_depend_on_the_batch(name: str) -> None:
    model = build(name, num_classes=10, image_size=32)
    batch = pictures(6, 32)
    for training in (False, True):
        together = model(batch, training=training)
        alone = tf.concat([model(batch[i : i + 1], training=training) for i in range(6)], axis=0)
        np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_saved_model_round_trip(name: str, tmp_path: pathlib.Path) -> None:
    model = build(name, num_classes=5, image_size=32)
    model.export(str(tmp_path)) if hasattr(model, "export") else model.save(str(tmp_path))
    signature = tf.saved_model.load(str(tmp_path)).signatures["serving_default"]
    (logits,) = signature(image=pictures(3, 32)).values()
    np.testing.assert_allclose(logits, model(pictures(3, 32)), rtol=1e-5, atol=1e-6)


FLOAT32_UNDER_BFLOAT16 = {"Rescaling", "GroupNorm", "GroupNormalization", "GlobalAveragePooling2D", "Dense"}


@pytest.mark.parametrize("name", ["tiny", "small", "resnet50v2", "bit_r50x1"])
def test_bfloat16_is_for_convolutions_and_never_for_sums_weights_or_logits(name: str) -> None:
    policy = tf.keras.mixed_precision.global_policy()
    with tf.Graph().as_default():  # variables without values
        model = build(name, num_classes=5, image_size=32, precision="bfloat16")
        assert (model.inputs[0].dtype, model.outputs[0].dtype) == (tf.float32, tf.float32)
    assert {variable.dtype for variable in model.weights} == {tf.float32}
    kinds = {(type(layer).__name__, layer.compute_dtype) for layer in model.layers}
    assert {kind for kind, dtype in kinds if dtype == "float32"} - {
        "InputLayer"
    } == FLOAT32_UNDER_BFLOAT16 & {kind for kind, _ in kinds}
    convolutions = [layer for layer in model.layers if "Conv2D" in type(layer).__name__]
    assert len(convolutions) >= 7
    assert {layer.compute_dtype for layer in convolutions} == {"bfloat16"}
    assert tf.keras.mixed_precision.global_policy() is policy


def test_batch_normalisation_keeps_float32_statistics_under_bfloat16() -> None:
    with tf.Graph().as_default() as graph:
        model = build("resnet50v2", num_classes=5, image_size=32, precision="bfloat16")
        model(tf.zeros([2, 32, 32, 3]), training=True)
        fused = [op for op in graph.get_operations() if op.type == "FusedBatchNormV3"]
    # x of bfloat16, its scale and moments of float32
    assert {(op.get_attr("T"), op.get_attr("U")) for op in fused} == {(tf.bfloat16, tf.float32)}


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_bfloat16_student_begins_with_the_same_weights_and_nearly_the_same_logits(name: str) -> None:
    logits, weights = {}, {}
    for precision in ("float32", "bfloat16"):
        tf.keras.utils.set_random_seed(3)
        model = build(name, num_classes=10, image_size=32, precision=precision)
        weights[precision], logits[precision] = model.get_weights(), model(pictures(4, 32))
    for narrow, wide in zip(weights["bfloat16"], weights["float32"], strict=True):
        np.testing.assert_array_equal(narrow, wide)
    assert logits["bfloat16"].dtype == tf.float32
    # bfloat16 has 8 bits: a rounding is 2^-9 = 0.002 of a number, and a path has a dozen of them.
    scale = np.abs(logits["float32"]).max()
    np.testing.assert_allclose(logits["bfloat16"], logits["float32"], atol=0.03 * scale)
    assert np.any(logits["bfloat16"] != logits["float32"])


def test_global_policy_is_neither_heeded_nor_changed() -> None:
    before = tf.keras.mixed_precision.global_policy()
    tf.keras.mixed_precision.set_global_policy("mixed_float16")
    try:
        model = build("tiny", num_classes=5, image_size=32)
        assert tf.keras.mixed_precision.global_policy().name == "mixed_float16"
        assert {layer.compute_dtype for layer in model.layers} == {"float32"}
        with pytest.raises(UserError):
            build("resnet50v2", num_classes=5, image_size=31, precision="bfloat16")
        assert tf.keras.mixed_precision.global_policy().name == "mixed_float16"
    finally:
        tf.keras.mixed_precision.set_global_policy(before)


def test_unknown_precision_is_refused() -> None:
    with pytest.raises(UserError, match="--precision=float16: expected one of float32, bfloat16"):
        build("tiny", num_classes=5, image_size=32, precision="float16")


def test_unknown_student_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"no student is named 'vgg'; choose one of bit_r101x1, .*, resnet50v2, small, tiny"
    ):
        build("vgg", num_classes=10, image_size=32)


@pytest.mark.parametrize(
    ("name", "num_classes", "image_size", "message"),
    [
        ("tiny", 0, 32, "num_classes must be >= 1; got 0"),
        ("tiny", 1, -1, "image_size must be >= 1; got -1"),
        ("resnet50v2", 1, 31, "resnet50v2 needs an image_size >= 32; got 31"),
    ],
)
def test_impossible_sizes_are_refused(name: str, num_classes: int, image_size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(name, num_classes=num_classes, image_size=image_size)
