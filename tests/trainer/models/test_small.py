"""trainer.models.small: `tiny` and `small`."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest
import tensorflow as tf

from tests.images import pictures
from trainer.models import build_student


@pytest.mark.parametrize(
    ("name", "num_classes", "image_size", "parameters"),
    [
        ("tiny", 10, 32, 77_850),
        ("small", 102, 128, 457_526),
    ],
)
def test_parameter_counts_and_shapes(name: str, num_classes: int, image_size: int, parameters: int) -> None:
    model = build_student(name, num_classes=num_classes, image_size=image_size)
    assert model.count_params() == parameters
    assert model.input_names == ["image"]
    assert model.input_shape == (None, image_size, image_size, 3)
    assert model.layers[-1].dtype == "float32"
    logits = model(pictures(2, image_size))
    assert (logits.shape, logits.dtype) == ((2, num_classes), tf.float32)
    assert np.all(np.isfinite(logits))


@pytest.mark.parametrize(
    ("name", "image_size", "sides"),
    [("tiny", 32, [16, 16, 8, 4]), ("small", 128, [32, 32, 16, 8, 4]), ("small", 50, [13, 13, 7, 4, 2])],
)
def test_the_stem_strides_and_all_blocks_but_the_first_halve(
    name: str, image_size: int, sides: list[int]
) -> None:
    with tf.Graph().as_default():  # variables without values
        model = build_student(name, num_classes=3, image_size=image_size)
    blocks = sorted(layer.name for layer in model.layers if layer.name.endswith("_add"))
    shapes = [model.get_layer(layer).output_shape for layer in ("stem", *blocks)]
    assert [shape[1:3] for shape in shapes] == [(side, side) for side in sides]


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_value_range(name: str) -> None:
    """An image in 0..1 counts as almost black."""
    model = build_student(name, num_classes=10, image_size=32)
    picture = pictures(1, 32)
    difference = np.abs(model(picture) - model(picture / 255)).max()
    assert difference > 10 * np.abs(model(picture / 255) - model(tf.zeros_like(picture))).max()


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_logits_do_not_depend_on_the_batch(name: str) -> None:
    model = build_student(name, num_classes=10, image_size=32)
    batch = pictures(6, 32)
    for training in (False, True):
        together = model(batch, training=training)
        alone = tf.concat([model(batch[i : i + 1], training=training) for i in range(6)], axis=0)
        np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_saved_model_round_trip(name: str, tmp_path: pathlib.Path) -> None:
    model = build_student(name, num_classes=5, image_size=32)
    model.export(str(tmp_path)) if hasattr(model, "export") else model.save(str(tmp_path))
    signature = tf.saved_model.load(str(tmp_path)).signatures["serving_default"]
    (logits,) = signature(image=pictures(3, 32)).values()
    np.testing.assert_allclose(logits, model(pictures(3, 32)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_bfloat16_student_begins_with_the_same_weights_and_nearly_the_same_logits(name: str) -> None:
    logits, weights = {}, {}
    for precision in ("float32", "bfloat16"):
        tf.keras.utils.set_random_seed(3)
        model = build_student(name, num_classes=10, image_size=32, precision=precision)
        weights[precision], logits[precision] = model.get_weights(), model(pictures(4, 32))
    for narrow, wide in zip(weights["bfloat16"], weights["float32"], strict=True):
        np.testing.assert_array_equal(narrow, wide)
    assert logits["bfloat16"].dtype == tf.float32
    # bfloat16 has 8 bits: one rounding changes a number by up to 2^-9 = 0.002, and a path has a dozen of them.
    scale = np.abs(logits["float32"]).max()
    np.testing.assert_allclose(logits["bfloat16"], logits["float32"], atol=0.03 * scale)
    assert np.any(logits["bfloat16"] != logits["float32"])
