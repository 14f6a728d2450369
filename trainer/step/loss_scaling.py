"""Loss scaling for float16, whose small gradients would be 0: Keras's LossScaleOptimizer, and the steps that it skipped."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

INITIAL_SCALE = 2.0**15
GROWTH_STEPS = 2000  # steps with finite gradients after which the scale is doubled
SMALLEST_SCALE = 1.0  # of Keras


def scale_loss(optimizer: tf.keras.optimizers.legacy.Optimizer) -> Any:
    """An optimizer with a dynamic loss scale, whose checkpoint has the scale and its counter besides the optimizer's state.

    A step with gradients that are not finite leaves weights and moments unchanged, halves the scale, and counts in
    `iterations`. `GROWTH_STEPS` steps without one double it.
    """
    return tf.keras.mixed_precision.LossScaleOptimizer(
        optimizer, initial_scale=INITIAL_SCALE, dynamic_growth_steps=GROWTH_STEPS
    )


def scales_loss(optimizer: Any) -> bool:
    """Whether an optimizer is one of Keras's with a loss scale."""
    return isinstance(optimizer, tf.keras.mixed_precision.LossScaleOptimizer)


class SkippedSteps(tf.Module):
    """Counts the steps that an optimizer with a loss scale skips. Part of the checkpoint.

    To be created in the strategy's scope.

    Attributes:
      total: Steps whose gradients were not finite, int64 scalar.
      unfit: Those of them whose targets were not finite, which no loss scale helps; int64 scalar.
    """

    def __init__(self) -> None:
        super().__init__(name="skipped_steps")
        self.total = self._counter("total")
        self.unfit = self._counter("unfit")

    @staticmethod
    def _counter(name: str) -> tf.Variable:
        aggregation = tf.VariableAggregation.ONLY_FIRST_REPLICA
        return tf.Variable(0, dtype=tf.int64, trainable=False, name=name, aggregation=aggregation)

    def count(self, optimizer: Any, *, gradient_norm: tf.Tensor, targets: tf.Tensor) -> dict[str, tf.Tensor]:
        """Counts a step; to be called by each replica after the update.

        Args:
          gradient_norm: Global norm of the gradients of all replicas.
          targets: The logits that this replica matched, float32 [B, C].

        Returns:
          `loss_scale` float32, after the step; `skipped_steps` and `unfit_steps` int64, `total` and `unfit` so far.
        """
        skipped = ~tf.math.is_finite(gradient_norm)
        unfit = tf.cast(~tf.reduce_all(tf.math.is_finite(targets)), tf.float32)
        context = tf.distribute.get_replica_context()
        if context.num_replicas_in_sync > 1:
            unfit = context.all_reduce("sum", unfit)
        self.total.assign_add(tf.cast(skipped, tf.int64))
        self.unfit.assign_add(tf.cast(skipped & (unfit > 0), tf.int64))
        return {
            "loss_scale": tf.identity(optimizer.loss_scale),
            "skipped_steps": tf.identity(self.total),
            "unfit_steps": tf.identity(self.unfit),
        }

    @staticmethod
    def empty_figures() -> dict[str, tf.Tensor]:
        """Zeros of the shapes and types that `count` returns."""
        counts = {name: tf.zeros([], tf.int64) for name in ("skipped_steps", "unfit_steps")}
        return {"loss_scale": tf.zeros([]), **counts}
