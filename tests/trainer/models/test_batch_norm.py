"""trainer.models.batch_norm: ResNet50V2 synchronised is ResNet50V2, and a student without batch norm is refused."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from pipeline.errors import UserError
from trainer.models import build
from trainer.models.batch_norm import averaged_statistics, replicas_notice, synchronise


def test_synchronised_resnet50v2_has_its_layers_weights_and_names():
    student = build("resnet50v2", num_classes=102, image_size=32)
    notice = replicas_notice(student, batch_size=512, replicas=8)
    assert notice is not None
    assert "resnet50v2 has batch normalisation: with 8 replicas its statistics are of 64 views" in notice
    assert replicas_notice(student, batch_size=512, replicas=1) is None
    synchronised = synchronise(student)
    assert replicas_notice(synchronised, batch_size=512, replicas=8) is None
    assert synchronised.count_params() == 23_773_798
    kinds = [(layer.name, type(layer)) for layer in student.layers]
    assert [(layer.name, type(layer)) for layer in synchronised.layers] == kinds
    assert [weight.name for weight in synchronised.weights] == [weight.name for weight in student.weights]
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.float32)
    np.testing.assert_array_equal(synchronised(images), student(images))


def test_student_without_batch_norm_is_refused():
    student = build("tiny", num_classes=3, image_size=16)
    assert replicas_notice(student, batch_size=8, replicas=2) is None
    with pytest.raises(UserError, match="--sync_batch_norm: tiny has no batch normalisation"):
        synchronise(student)


def test_moving_statistics_are_of_the_kind_that_is_the_same_on_all_replicas():
    with tf.distribute.MirroredStrategy(["CPU:0"]).scope(), averaged_statistics():
        layer = tf.keras.layers.BatchNormalization()
        layer.build([None, 4])
    for variable in layer.non_trainable_variables:
        assert variable.synchronization is tf.VariableSynchronization.ON_WRITE
        assert variable.aggregation is tf.VariableAggregation.MEAN
