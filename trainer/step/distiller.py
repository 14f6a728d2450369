"""The Keras model that is trained: mix on the device, run the student, match the teacher, update.

Everything between the batch that `tf.data` delivers and the updated weights, as TensorFlow ops of static
shape and nothing else, so that the step compiles under XLA as a TPU needs it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from pipeline.errors import UserError
from pipeline.views.mix import mix
from trainer.distribution.strategy import gather_views
from trainer.step.xla_loop import Batch, run_steps, stack_batches

TensorFunction = Callable[[tf.Tensor], tf.Tensor]


def distillation_loss(
    teacher_logits: tf.Tensor, student_logits: tf.Tensor, *, temperature: float, temperature_squared: bool
) -> tf.Tensor:
    """KL(softmax(teacher / T) || softmax(student / T)), summed over the classes (Hinton et al. 2015).

    Args:
      teacher_logits: [B, C], any float.
      student_logits: [B, C], any float.
      temperature: T > 0.
      temperature_squared: times T^2, which keeps the gradient's size when T changes: big_vision does so,
        the Keras example does not.

    Returns:
      float32 [B], >= 0 up to rounding, in nats (times T^2).
    """
    teacher = tf.nn.log_softmax(tf.cast(teacher_logits, tf.float32) / temperature)
    student = tf.nn.log_softmax(tf.cast(student_logits, tf.float32) / temperature)
    loss = tf.reduce_sum(tf.exp(teacher) * (teacher - student), axis=-1)
    return loss * temperature**2 if temperature_squared else loss


def shown_to_teacher(batch: Batch, views: tf.Tensor) -> tf.Tensor:
    """What a live teacher sees: the student's views, or crops of its own where the batch has them.

    Args:
      batch: see `Distiller`.
      views: the student's, float32 [B, S, S, 3] in 0..255.

    Returns:
      float32 [B, S, S, 3] in 0..255.
    """
    return tf.cast(batch["teacher_crops"], tf.float32) if "teacher_crops" in batch else views


class Distiller(tf.keras.Model):
    """Trains a student on the teacher's logits for the same views, in `fit` or a loop over `train_step`.

    A batch is a dict of tensors of static shape: `crops` uint8 [K, S, S, 3], `partner` int32 [B] (rows of
    `crops`), `ratio` float32 [B], `logits` float32 [B, C]; when a teacher continues where the store ends,
    `stored` bool [B]: which rows of `logits` are the store's, the teacher makes the others, for the same views or for
    `teacher_crops` uint8 [B, S, S, 3], other crops of the same images; to be told what a
    step trained on, `views` int64 [B]: the views' indices; and, for the teacher's logits to come out of the step,
    `record`: a dict of what else is wanted with them.

    Only the student is tracked: the teacher is in no list of weights and in no checkpoint.
    """

    train_function: Any  # Keras's: what `fit` calls for an execution

    def __init__(
        self,
        student: tf.keras.Model,
        *,
        temperature: float,
        temperature_squared: bool,
        teacher: TensorFunction | None = None,
        round_trip: TensorFunction | None = None,
    ) -> None:
        """Wraps a student.

        Args:
          student: float32 [B, S, S, 3] in 0..255 -> logits [B, C].
          temperature: T > 0 of the loss.
          temperature_squared: see `distillation_loss`.
          teacher: float32 [B, S, S, 3] in 0..255 -> logits [B, C]; needed for batches with `stored`.
          round_trip: the store's codec, encode and decode, as a function of the online logits float32
            [B, C] -> [B, C]; None changes nothing.

        Raises:
          UserError: if the temperature is not finite and positive.
        """
        super().__init__(name="distiller")
        if not (math.isfinite(temperature) and temperature > 0):
            raise UserError(f"temperature must be finite and > 0; got {temperature}")
        self.student = student
        self._temperature = temperature
        self._temperature_squared = temperature_squared
        self._codec: TensorFunction = round_trip or tf.identity
        self._teacher: TensorFunction | None = None
        if teacher is not None:  # inside a function, where Keras does not find its variables
            self._teacher = lambda views: tf.cast(teacher(views), tf.float32)
        # `train_step` has reduced its figures over the replicas; Keras would add them up.
        self.distribute_reduction_method = "first"

    def call(self, inputs: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        """The student's logits [B, C] for views float32 [B, S, S, 3] in 0..255."""
        return self.student(inputs, training=training)

    def train_step(self, data: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """One update.

        Args:
          data: a batch, see the class.

        Returns:
          float32 scalars of this step and all replicas: `loss` (mean over the views, with the student's
          regularisation losses), `agreement` (fraction of views with the teacher's argmax),
          `gradient_norm` (global, before clipping). With `views` in the batch also `views`, int64 [R * B]:
          those of all replicas, in their order. With `record`, also that dict, with `ratio` and the teacher's
          `logits` for each view, float32 [B, C], before the codec; of this replica.

        Raises:
          ValueError: while tracing, if the batch has `stored` and there is no teacher.
        """
        views = mix(data["crops"], data["partner"], data["ratio"])  # [B, S, S, 3] float32
        online = None if "stored" not in data else self._online_logits(shown_to_teacher(data, views))
        targets = tf.stop_gradient(self._targets(data, online))
        # One replica's share of the mean: the optimizer adds the replicas' gradients up.
        context = tf.distribute.get_replica_context()
        replicas = context.num_replicas_in_sync
        with tf.GradientTape() as tape:
            logits = self.student(views, training=True)
            losses = distillation_loss(
                targets,
                logits,
                temperature=self._temperature,
                temperature_squared=self._temperature_squared,
            )
            loss = (tf.reduce_mean(losses) + tf.add_n([0.0, *self.student.losses])) / replicas
        agreement = _agreement(targets, logits) / replicas
        variables = self.student.trainable_variables
        gradients = tape.gradient(loss, variables)
        aggregation: dict[str, Any] = {}
        if replicas > 1:  # here and not in the optimizer, for the norm of the sum
            gradients, loss, agreement = context.all_reduce("sum", [gradients, loss, agreement])
            aggregation = {"experimental_aggregate_gradients": False}
        self.optimizer.apply_gradients(zip(gradients, variables, strict=True), **aggregation)
        figures = {"loss": loss, "agreement": agreement, "gradient_norm": tf.linalg.global_norm(gradients)}
        if "views" in data:
            figures["views"] = gather_views(data["views"], context) if replicas > 1 else data["views"]
        if "record" in data:
            figures["record"] = {**data["record"], "ratio": data["ratio"], "logits": online}
        return figures

    def train_steps(self, batches: Batch, count: tf.Tensor) -> dict[str, tf.Tensor]:
        """Several updates in one loop, which compiles under XLA as a whole.

        Args:
          batches: a stack of batches: each tensor of one with a leading axis [n].
          count: int64 scalar, 1 to n: how many of them are trained on.

        Returns:
          What `train_step` returns, of the last one.
        """
        none = {name: tf.zeros([]) for name in ("loss", "agreement", "gradient_norm")}
        if "views" in batches:
            none["views"] = tf.zeros_like(batches["views"][0])
        return run_steps(self.train_step, batches, count, none=none)

    def make_train_function(self, force: bool = False) -> Callable[[Iterator[Batch]], dict[str, tf.Tensor]]:
        """Keras's, called by `fit`; but several compiled steps are one program (see `trainer.step.xla_loop`)."""
        size = int(self.steps_per_execution.numpy())
        if not self.jit_compile or size == 1:
            return super().make_train_function(force)
        if self.train_function is None or force:
            compiled = tf.function(self.train_steps, jit_compile=True)

            @tf.function
            def execute(batches: Iterator[Batch]) -> dict[str, tf.Tensor]:
                count = (
                    self.steps_per_execution.read_value()
                )  # Keras's last one of an interval may be shorter
                return compiled(stack_batches(batches, count, size=size), count)

            self.train_tf_function = self.train_function = execute
        return self.train_function

    def _online_logits(self, views: tf.Tensor) -> tf.Tensor:
        """The live teacher's logits float32 [B, C]."""
        if self._teacher is None:
            raise ValueError("the batch has views that may not be stored, and the Distiller got no teacher")
        return self._teacher(views)

    def _targets(self, data: dict[str, tf.Tensor], online: tf.Tensor | None) -> tf.Tensor:
        """The teacher's logits float32 [B, C]: stored, or made now where `stored` is False."""
        if online is None:
            return data["logits"]
        return tf.where(data["stored"][:, tf.newaxis], data["logits"], self._codec(online))


def _agreement(teacher_logits: tf.Tensor, student_logits: tf.Tensor) -> tf.Tensor:
    """Fraction of rows of [B, C] whose argmax is the same; float32 scalar."""
    same = tf.argmax(teacher_logits, axis=-1) == tf.argmax(student_logits, axis=-1)
    return tf.reduce_mean(tf.cast(same, tf.float32))
