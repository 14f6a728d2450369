"""Students `keras:NAME`: all names exist, preprocessing is the model's own, and precision is that of all students."""

from __future__ import annotations

import inspect
import sys

import numpy as np
import pytest
import tensorflow as tf

from pipeline.errors import UserError
from tests.images import pictures
from trainer.config.choices import KERAS_STUDENTS
from trainer.models import build_student
from trainer.models.keras_applications import _preprocess


def test_names_are_the_classifiers_of_keras() -> None:
    functions = [name for name, value in vars(tf.keras.applications).items() if inspect.isfunction(value)]
    assert sorted(KERAS_STUDENTS) == sorted(functions)


@pytest.mark.parametrize(
    "name", ["DenseNet121", "VGG16", "ResNet50", "MobileNet", "MobileNetV3Small", "ConvNeXtTiny"]
)
def test_preprocessing_is_that_of_the_model(name: str) -> None:
    module = sys.modules[getattr(tf.keras.applications, name).__module__]
    image = tf.keras.Input((4, 4, 3))
    model = tf.keras.Model(image, tf.identity(_preprocess(image, module.preprocess_input)))
    pixels = np.asarray(pictures(2, 4))
    np.testing.assert_allclose(model(pixels), module.preprocess_input(pixels.copy()), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "size"), [("VGG16", 24), ("MobileNetV3Small", 31), ("InceptionV3", 64), ("Xception", 64)]
)
def test_image_that_is_too_small_is_refused(name: str, size: int) -> None:
    with pytest.raises(UserError, match=rf"`image_size`={size}: keras:{name} .*at least"):
        build_student(f"keras:{name}", num_classes=5, image_size=size)


@pytest.mark.parametrize(
    "name",
    ["MobileNet", *(pytest.param(n, marks=pytest.mark.slow) for n in ("EfficientNetB0", "ConvNeXtTiny"))],
)
def test_bfloat16_is_for_the_body_only(name: str) -> None:
    models = {}
    for precision in ("float32", "bfloat16"):
        tf.keras.utils.set_random_seed(3)
        models[precision] = build_student(f"keras:{name}", num_classes=5, image_size=32, precision=precision)
    wide, narrow = models.values()
    assert (narrow.inputs[0].dtype, narrow.outputs[0].dtype) == (tf.float32, tf.float32)
    assert narrow.layers[1].compute_dtype == "float32"  # scales views
    pools = [one for one in narrow.layers if isinstance(one, tf.keras.layers.GlobalAveragePooling2D)]
    assert {layer.compute_dtype for layer in pools} == {"float32"}
    convolutions = [layer for layer in narrow.layers if "Conv2D" in type(layer).__name__]
    assert "bfloat16" in {layer.compute_dtype for layer in convolutions}
    assert {weight.dtype for weight in narrow.trainable_weights} == {tf.float32}
    for ours, theirs in zip(narrow.weights, wide.weights, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    image = np.asarray(pictures(2, 32))
    np.testing.assert_allclose(narrow(image), wide(image), rtol=0.1, atol=0.05)


@pytest.mark.slow
def test_efficientnet_normalizes_like_the_published_one() -> None:
    student = build_student("keras:EfficientNetB0", num_classes=5, image_size=32)
    normalized = tf.keras.Model(student.inputs, student.get_layer("stem_conv_pad").input)
    pixels = np.asarray(pictures(1, 32))
    expected = (pixels / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(normalized(pixels), expected, rtol=0, atol=1e-4)
