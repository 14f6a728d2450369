"""trainer.finetuning.pretrained: networks from published weights and from teachers, whose head is replaced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from pipeline.errors import UserError
from pipeline.inputs.teacher import Teacher
from tests import stores
from tests.teachers import convert_arguments, finetune_arguments, losses, weights_of
from trainer.finetuning.pretrained import replace_head
from trainer.models.keras_model import load_keras_model
from trainer.teacher import main

pytestmark = pytest.mark.usefixtures("bit_small")


def test_head_of_a_keras_saved_model_is_replaced_and_trained_alone(
    colors_dir: Path, tmp_path: Path, keras_teacher_path: Path
):
    network = f"--teacher={keras_teacher_path}"
    main(finetune_arguments(colors_dir, tmp_path, "--head_only", "--steps=30", network=network))
    found, before = weights_of(tmp_path / "teacher"), weights_of(keras_teacher_path)
    for ours, theirs in zip(found[:2], before[:2], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert losses(tmp_path)[0] == pytest.approx(np.log(stores.CLASSES), rel=1e-5)  # because the head is zero
    assert losses(tmp_path)[-1] < 0.8 * np.log(stores.CLASSES)


def test_whole_keras_saved_model_is_trained(colors_dir: Path, tmp_path: Path, keras_teacher_path: Path):
    network = f"--teacher={keras_teacher_path}"
    main(finetune_arguments(colors_dir, tmp_path, "--steps=3", network=network))
    for ours, theirs in zip(weights_of(tmp_path / "teacher"), weights_of(keras_teacher_path), strict=True):
        assert (ours != theirs).any()


def test_teacher_with_a_softmax_and_another_value_range_takes_0_to_255(colors_dir: Path, tmp_path: Path):
    layers = tf.keras.layers
    image = tf.keras.Input([None, None, 3], name="picture")
    x = layers.GlobalAveragePooling2D()(layers.Conv2D(8, 3, name="first")(image))
    x = layers.Softmax()(layers.Dense(3, name="classes")(x))
    tf.keras.Model(image, x, name="other").save(tmp_path / "other", include_optimizer=False)
    network = f"--teacher={tmp_path}/other"
    extra = ["--teacher_value_range=-1..1", "--steps=3", "--learning_rate=0"]
    main(finetune_arguments(colors_dir, tmp_path, *extra, network=network))
    model = load_keras_model(str(tmp_path / "teacher"), parameter="teacher")
    assert model.output_shape == (None, stores.CLASSES)
    gray = tf.fill([1, 24, 24, 3], 127.5)  # 0 for the network, whose biases are still zero
    body = tf.keras.Model(model.input, model.layers[-1].input)
    np.testing.assert_allclose(body(gray), np.zeros((1, 8)), atol=1e-6)
    assert np.abs(body(gray + 100)).max() > 0.01


def nested(*, training: bool | None = None) -> tf.keras.Model:
    """A rescaling layer, and a model with batch normalization and a softmax head as one layer."""
    layers = tf.keras.layers
    image = tf.keras.Input([24, 24, 3])
    x = layers.GlobalAveragePooling2D()(layers.BatchNormalization()(layers.Conv2D(8, 3)(image)))
    inner = tf.keras.Model(image, layers.Dense(3, "softmax", name="predictions")(x), name="inner")
    outer = tf.keras.Input([24, 24, 3])
    return tf.keras.Model(outer, inner(layers.Rescaling(1 / 127.5, -1.0)(outer), training=training))


def test_head_of_a_nested_model_is_replaced(colors_dir: Path, tmp_path: Path):
    nested().save(tmp_path / "nested.keras")
    main(finetune_arguments(colors_dir, tmp_path, "--steps=3", network=f"--teacher={tmp_path}/nested.keras"))
    before = load_keras_model(str(tmp_path / "nested.keras"), parameter="teacher").get_weights()
    found = weights_of(tmp_path / "teacher")
    assert [w.shape for w in found[:-2]] == [w.shape for w in before[:-2]]
    assert found[-1].shape == (stores.CLASSES,)
    assert (found[0] != before[0]).any()  # the convolution was trained as well
    assert losses(tmp_path)[0] == pytest.approx(np.log(stores.CLASSES), rel=1e-5)  # because the head is zero


@pytest.mark.parametrize("training", [None, False])
def test_nested_model_keeps_its_training_argument(training: bool | None):
    network = replace_head(nested(training=training), num_classes=5, image_size=24, value_range="0..255")
    body = tf.keras.Model(network.input, network.layers[-1].input)
    images = tf.random.stateless_uniform([4, 24, 24, 3], [0, 0], maxval=255.0)
    frozen = np.array_equal(body(images, training=True), body(images, training=False))
    assert frozen == (training is False)


def test_head_of_a_keras_application_behind_a_rescaling_is_replaced():
    layers, applications = tf.keras.layers, tf.keras.applications
    options = {"weights": None, "input_shape": (32, 32, 3), "classes": 3}
    model = tf.keras.Sequential(
        [layers.Rescaling(1 / 127.5, -1.0), applications.MobileNetV2(alpha=0.35, **options)]
    )
    model.build([None, 32, 32, 3])
    network = replace_head(model, num_classes=5, image_size=32, value_range="0..255")
    assert network.output_shape == (None, 5)
    assert len(network.trainable_weights) == len(model.trainable_weights)
    # MobileNet ends in a convolution.
    model = tf.keras.Sequential([layers.Rescaling(1.0), applications.MobileNet(alpha=0.25, **options)])
    model.build([None, 32, 32, 3])
    with pytest.raises(UserError, match="Dense"):
        replace_head(model, num_classes=5, image_size=32, value_range="0..255")


class Doubled(tf.keras.layers.Layer):
    """Not registered with Keras, which has to restore it from its trace."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.factor = self.add_weight("factor", [], initializer=tf.keras.initializers.Constant(2.0))

    def call(self, x: tf.Tensor) -> tf.Tensor:
        return x * self.factor


def test_teacher_with_a_layer_of_an_unknown_class(colors_dir: Path, tmp_path: Path):
    layers = tf.keras.layers
    image = tf.keras.Input([24, 24, 3])
    x = Doubled()(layers.GlobalAveragePooling2D()(layers.Rescaling(1 / 255.0)(image)))
    tf.keras.Model(image, layers.Dense(3)(x)).save(tmp_path / "custom", include_optimizer=False)
    network = f"--teacher={tmp_path}/custom"
    main(finetune_arguments(colors_dir, tmp_path, "--steps=30", network=network))
    assert losses(tmp_path)[-1] < losses(tmp_path)[0]
    Teacher(tmp_path / "teacher", image_size=24, num_classes=stores.CLASSES)
    assert (
        load_keras_model(str(tmp_path / "teacher"), parameter="init").count_params() == 1 + 4 * stores.CLASSES
    )


@pytest.mark.parametrize(
    "given",
    [
        "npz",
        pytest.param("saved_model", marks=pytest.mark.slow),
        pytest.param("teacher", marks=pytest.mark.slow),
    ],
)
def test_bit_starts_from_the_weights_of_a_checkpoint(colors_dir: Path, tmp_path: Path, npz: Path, given: str):
    main(convert_arguments(npz, tmp_path / "converted"))
    network, extra = {
        "npz": ("--model=bit_small", [f"--init={npz}"]),
        "saved_model": ("--model=bit_small", [f"--init={tmp_path}/converted"]),
        "teacher": (f"--teacher={tmp_path}/converted", []),
    }[given]
    extra += ["--steps=1", "--learning_rate=0", "--image_size=33"]
    main(finetune_arguments(colors_dir, tmp_path, *extra, network=network))
    found, before = weights_of(tmp_path / "teacher"), weights_of(tmp_path / "converted")
    for ours, theirs in zip(found[:-2], before[:-2], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert found[-2].shape == (512, stores.CLASSES)
    assert not found[-2].any()
