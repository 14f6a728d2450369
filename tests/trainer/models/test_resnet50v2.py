"""trainer.models.resnet50v2: Keras's network with the project's head and scaling."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from pipeline.errors import UserError
from tests.images import pictures
from trainer.models import build_student
from trainer.models.resnet50v2 import resnet50v2


def test_published_parameter_count_and_shapes() -> None:
    with tf.Graph().as_default():  # variables without values
        model = build_student("resnet50v2", num_classes=102, image_size=128)
    assert model.count_params() == 23_773_798  # He et al. 2016, with 102 classes
    assert model.input_names == ["image"]
    assert (model.input_shape, model.output_shape) == ((None, 128, 128, 3), (None, 102))
    assert {tensor.dtype for tensor in (*model.inputs, *model.outputs)} == {tf.float32}


def test_it_is_keras_own_network_on_images_scaled_as_keras_does() -> None:
    """The network of `tf.keras.applications` with `preprocess_input` and the same weights has the same logits."""
    model = resnet50v2(3, 32)
    whole = tf.keras.applications.ResNet50V2(
        weights=None, input_shape=(32, 32, 3), classes=3, classifier_activation=None
    )
    whole.set_weights(model.get_weights())
    images = pictures(2, 32)
    expected = whole(tf.keras.applications.resnet_v2.preprocess_input(tf.identity(images)))
    np.testing.assert_allclose(model(images), expected, rtol=1e-4, atol=1e-4)


def test_batch_normalization_keeps_float32_statistics_under_bfloat16() -> None:
    with tf.Graph().as_default() as graph:
        model = build_student("resnet50v2", num_classes=5, image_size=32, precision="bfloat16")
        model(tf.zeros([2, 32, 32, 3]), training=True)
        fused = [op for op in graph.get_operations() if op.type == "FusedBatchNormV3"]
    # inputs bfloat16, scale and moments float32
    assert {(op.get_attr("T"), op.get_attr("U")) for op in fused} == {(tf.bfloat16, tf.float32)}


def test_smaller_images_than_keras_takes_are_refused() -> None:
    with pytest.raises(UserError, match=r"`image_size`=31.*32"):
        build_student("resnet50v2", num_classes=1, image_size=31)
