"""pipeline.views.mix: mixup compared to NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from pipeline.views.mix import mix

CROPS = np.random.default_rng(0).integers(0, 256, (6, 5, 5, 3), np.uint8)
PARTNER = np.array([1, 2, 5, 0], np.int32)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "graph"])
def test_mix_against_numpy(compiled: bool) -> None:
    ratio = np.array([0.25, 1.0, 0.0, 0.7], np.float32)
    function = tf.function(mix) if compiled else mix
    mixed = function(tf.constant(CROPS), tf.constant(PARTNER), tf.constant(ratio))
    assert mixed.dtype == tf.float32
    r = ratio[:, None, None, None]
    own, other = CROPS[:4].astype(np.float32), CROPS[PARTNER].astype(np.float32)
    np.testing.assert_array_equal(mixed.numpy(), r * own + (np.float32(1) - r) * other)
    np.testing.assert_array_equal(mixed.numpy()[1], own[1])
    np.testing.assert_array_equal(mixed.numpy()[2], other[2])
