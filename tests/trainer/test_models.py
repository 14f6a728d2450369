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


def test_head_stays_float32_under_mixed_precision() -> None:
    before = tf.keras.mixed_precision.global_policy()
    tf.keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        model = build("tiny", num_classes=5, image_size=32)
    finally:
        tf.keras.mixed_precision.set_global_policy(before)
    assert model.get_layer("block0_1_conv").compute_dtype == "bfloat16"
    assert model(pictures(1, 32)).dtype == tf.float32


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
