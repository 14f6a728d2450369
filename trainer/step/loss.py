"""The distillation loss, for the Distiller and for any Keras model."""

from __future__ import annotations

import math
from typing import Any

import tensorflow as tf

from pipeline.errors import UserError


@tf.keras.utils.register_keras_serializable("view_distill")
class DistillationLoss(tf.keras.losses.Loss):
    """KL(softmax(teacher / T) || softmax(student / T)), summed over the classes (Hinton et al. 2015).

    Usable wherever Keras takes a loss, with the teacher's logits as targets; Keras then takes the mean over the batch:

        student.compile("adam", loss=DistillationLoss(temperature=10))
        student.fit(store.as_dataset(batch_size=64))  # of (views [B, S, S, 3], teacher logits [B, C])

    Args:
      temperature_squared: Whether to multiply by T^2, so that the size of the gradient does not depend on T. big_vision
        does; the Keras example does not.
      reduction: Reduction over the batch, see `tf.keras.losses.Loss`; the mean by default.

    Raises:
      UserError: `temperature` is not finite and positive.
    """

    def __init__(
        self,
        temperature: float,
        *,
        temperature_squared: bool = False,
        reduction: str = tf.keras.losses.Reduction.AUTO,
        name: str = "distillation_loss",
    ) -> None:
        super().__init__(reduction=reduction, name=name)
        if not (math.isfinite(temperature) and temperature > 0):
            raise UserError(f"`temperature`={temperature}: expected a finite number > 0")
        self.temperature = temperature
        self.temperature_squared = temperature_squared

    def call(self, y_true: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
        """The loss of each view.

        Args:
          y_true: Teacher logits [B, C], any float type.
          y_pred: Student logits [B, C], any float type.

        Returns:
          float32 [B], >= 0 up to rounding, in nats (times T^2).
        """
        teacher = tf.nn.log_softmax(tf.cast(y_true, tf.float32) / self.temperature)
        student = tf.nn.log_softmax(tf.cast(y_pred, tf.float32) / self.temperature)
        loss = tf.reduce_sum(tf.exp(teacher) * (teacher - student), axis=-1)
        return loss * self.temperature**2 if self.temperature_squared else loss

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            **super().get_config(),
            "temperature": self.temperature,
            "temperature_squared": self.temperature_squared,
        }
