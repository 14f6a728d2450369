"""trainer.models.batch_norm: a synchronized ResNet50V2 computes the same, and a student without batch norm is refused."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from pipeline.errors import UserError
from trainer.models import build_student
from trainer.models.batch_norm import averaged_statistics, replicas_notice, synchronize


def test_synchronized_resnet50v2_has_its_layers_weights_and_names():
    student = build_student("resnet50v2", num_classes=102, image_size=32)
    notice = replicas_notice(student, batch_size=512, replicas=8)
    assert notice is not None
    assert all(text in notice for text in ("resnet50v2", "8 replicas", "64", "512", "--sync_batch_norm"))
    assert replicas_notice(student, batch_size=512, replicas=1) is None
    synchronized = synchronize(student)
    assert replicas_notice(synchronized, batch_size=512, replicas=8) is None
    assert synchronized.count_params() == 23_773_798
    kinds = [(layer.name, type(layer)) for layer in student.layers]
    assert [(layer.name, type(layer)) for layer in synchronized.layers] == kinds
    assert [weight.name for weight in synchronized.weights] == [weight.name for weight in student.weights]
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.float32)
    np.testing.assert_array_equal(synchronized(images), student(images))


def test_student_without_batch_norm_is_refused():
    student = build_student("tiny", num_classes=3, image_size=16)
    assert replicas_notice(student, batch_size=8, replicas=2) is None
    with pytest.raises(UserError, match=r"--sync_batch_norm.*tiny"):
        synchronize(student)


def test_moving_statistics_are_equal_on_all_replicas():
    with tf.distribute.MirroredStrategy(["CPU:0"]).scope(), averaged_statistics():
        layer = tf.keras.layers.BatchNormalization()
        layer.build([None, 4])
    for variable in layer.non_trainable_variables:
        assert variable.synchronization is tf.VariableSynchronization.ON_WRITE
        assert variable.aggregation is tf.VariableAggregation.MEAN
