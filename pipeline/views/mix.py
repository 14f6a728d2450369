"""Mixup on the accelerator. Crops are `uint8` up to this point."""

from __future__ import annotations

import tensorflow as tf


def mix(crops: tf.Tensor, partner: tf.Tensor, ratio: tf.Tensor) -> tf.Tensor:
    """Mixes crops: `ratio * crop + (1 - ratio) * partner's crop`, in this order of operations.

    Args:
      crops: uint8 [K, S, S, 3]; the first B belong to the batch.
      partner: int32 [B], in 0..K-1.
      ratio: float32 [B], in 0..1.

    Returns:
      float32 [B, S, S, 3], in 0..255.
    """
    batch_size = partner.shape[0]
    own = tf.cast(crops[:batch_size], tf.float32)
    other = tf.cast(tf.gather(crops, partner), tf.float32)
    ratio = tf.reshape(ratio, [batch_size, 1, 1, 1])
    return ratio * own + (1.0 - ratio) * other
