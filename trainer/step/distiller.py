"""The Keras model that is trained: mixes on the device, runs the student, matches the teacher, updates the weights.

It covers everything between the batch that `tf.data` delivers and the updated weights, in TensorFlow ops of static shape
only, so that the step compiles under XLA, as a TPU requires.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from pipeline.views.mix import mix
from trainer.models.randomness import Generators
from trainer.step.loss import DistillationLoss
from trainer.step.loss_scaling import SkippedSteps, scales_loss
from trainer.step.xla_loop import Batch, run_steps, stack_batches

TensorFunction = Callable[[Any], Any]  # of tensors


def shown_to_teacher(batch: Batch, views: tf.Tensor) -> Any:
    """The views that a live teacher sees: the student's, or mixed views of its own if the batch has crops for them.

    Args:
      batch: See `Distiller`.
      views: The student's views, float32 [B, S, S, 3] in 0..255.

    Returns:
      float32 [B, T, T, 3] in 0..255, or a dict of such if `teacher_crops` is one.
    """
    if "teacher_crops" not in batch:
        return views
    return tf.nest.map_structure(
        lambda crops: mix(crops, batch["partner"], batch["ratio"]), batch["teacher_crops"]
    )


class Distiller(tf.keras.Model):
    """Trains a student on the teacher's logits for the same views.

        distiller = Distiller(student, temperature=10)
        distiller.compile("adam")
        distiller.fit(batches)
        student.save("student.keras")

    A batch is a dict of tensors of static shape:

    - `crops` uint8 [K, S, S, 3]: the views before mixing, the batch's own B first, then their other partners.
    - `partner` int32 [B]: the row of `crops` that is mixed in.
    - `ratio` float32 [B]: mixup ratio; view `i` is `ratio * crops[i] + (1 - ratio) * crops[partner[i]]`.
    - `logits` float32 [B, C]: the teacher's logits.

    Optional entries:

    - `stored` bool [B]: False for rows whose logits the live teacher computes in the step.
    - `teacher_crops` uint8 [K, T, T, 3]: what is mixed for the live teacher instead of `crops`, with the same partners and
      ratios; or a dict of such by image size, for a teacher that takes a dict.
    - `views` int64 [B]: view indices, returned by the step of a single replica.
    - `record`: dict of further columns, returned by the step together with the teacher's logits.

    `trainer.targets.batches.Targets` makes such batches from a store. For views that are already mixed, such as those of
    `store.as_dataset(...)`, use the student's own `fit` with a `DistillationLoss` instead.

    Only the student is tracked: the teacher is in no list of weights and in no checkpoint. To evaluate or to predict, use
    the student itself.

    Args:
      student: Model from float32 [B, S, S, 3] in 0..255 to logits [B, C].
      temperature_squared: Whether to multiply the loss by T^2, see `DistillationLoss`.
      teacher: Live teacher, float32 [B, S, S, 3] in 0..255 to logits [B, C]; required for batches with `stored`. Several
        teachers return a tuple of logits.
      round_trip: The store's codec (encode, then decode), applied to the live teacher's output, to float32 [B, C]; the
        identity by default.

    Raises:
      UserError: `temperature` is not finite and positive.
    """

    train_function: Any  # Keras's: what `fit` calls once per `steps_per_execution` steps

    def __init__(
        self,
        student: tf.keras.Model,
        *,
        temperature: float,
        temperature_squared: bool = False,
        teacher: TensorFunction | None = None,
        round_trip: TensorFunction | None = None,
    ) -> None:
        super().__init__(name="distiller")
        self.student = student
        self._distillation_loss = DistillationLoss(temperature, temperature_squared=temperature_squared)
        self._generators = Generators(student)
        self.skipped: SkippedSteps | None = None
        self._codec: TensorFunction = round_trip or tf.identity
        self._teacher: TensorFunction | None = None
        if teacher is not None:  # inside a function, where Keras does not find its variables
            self._teacher = lambda views: tf.nest.map_structure(
                lambda logits: tf.cast(logits, tf.float32), teacher(views)
            )
        # `train_step` reduces its outputs over the replicas itself; Keras would add them up.
        self.distribute_reduction_method = "first"

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Keras's, see `tf.keras.Model.compile`. Under a `LossScaleOptimizer`, the loss is scaled."""
        super().compile(*args, **kwargs)
        if scales_loss(self.optimizer):
            with self.distribute_strategy.scope():
                self.skipped = SkippedSteps()
        if self._generators:
            _ = self.optimizer.iterations  # is created when it is first read, which replicas cannot do

    def call(self, inputs: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        """The student's logits [B, C] for views float32 [B, S, S, 3] in 0..255."""
        return self.student(inputs, training=training)

    def train_step(self, data: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Performs one update.

        Returns:
          float32 scalars over all replicas: `loss` (mean over the views, plus the student's regularization losses),
          `agreement` (fraction of views with the teacher's argmax), `gradient_norm` (global, before clipping).
          With one replica and `views` in the batch, also `views`. With `record` in the batch, also that dict with `ratio`
          and the teacher's `logits` float32 [B, C] before the codec, of this replica.
          With a loss scale, also the figures of `SkippedSteps.count`; `gradient_norm` is not finite in a skipped step.

        Raises:
          ValueError: while tracing, if the batch has `stored` and there is no teacher.
        """
        views = mix(data["crops"], data["partner"], data["ratio"])  # [B, S, S, 3] float32
        online = None if "stored" not in data else self._online_logits(shown_to_teacher(data, views))
        targets = tf.stop_gradient(self._targets(data, online))
        # One replica's share of the mean, because the optimizer adds up the gradients of the replicas.
        context = tf.distribute.get_replica_context()
        replicas = context.num_replicas_in_sync
        if self._generators:
            self._generators.reset(self.optimizer.iterations)
        loss, logits, gradients = self._differentiate(views, targets, replicas=replicas)
        agreement = _agreement(targets, logits) / replicas
        aggregation: dict[str, Any] = {}
        if replicas > 1:  # here and not in the optimizer, for the norm of the sum
            gradients, loss, agreement = context.all_reduce("sum", [gradients, loss, agreement])
            aggregation = {"experimental_aggregate_gradients": False}
        variables = self.student.trainable_variables
        self.optimizer.apply_gradients(zip(gradients, variables, strict=True), **aggregation)
        norm = tf.linalg.global_norm(gradients)
        figures = {"loss": loss, "agreement": agreement, "gradient_norm": norm}
        if self.skipped is not None:
            figures |= self.skipped.count(self.optimizer, gradient_norm=norm, targets=targets)
        if "views" in data and replicas == 1:
            figures["views"] = data["views"]
        if "record" in data:
            figures["record"] = {**data["record"], "ratio": data["ratio"], "logits": online}
        return figures

    def _differentiate(
        self, views: tf.Tensor, targets: tf.Tensor, *, replicas: int
    ) -> tuple[tf.Tensor, tf.Tensor, list[tf.Tensor]]:
        """The loss (a replica's share of the mean), the student's logits [B, C], and the gradients of its weights."""
        with tf.GradientTape() as tape:
            logits = self.student(views, training=True)
            losses = self._distillation_loss.call(targets, logits)
            loss = (tf.reduce_mean(losses) + tf.add_n([0.0, *self.student.losses])) / replicas
            scaled = loss if self.skipped is None else self.optimizer.get_scaled_loss(loss)
        gradients = tape.gradient(scaled, self.student.trainable_variables)
        if self.skipped is not None:
            gradients = self.optimizer.get_unscaled_gradients(gradients)
        return loss, logits, gradients

    def train_steps(self, batches: Batch, count: tf.Tensor) -> dict[str, tf.Tensor]:
        """Performs several updates in one loop, which compiles under XLA as a whole.

        Args:
          batches: A stack of batches, each tensor with a leading axis [n].
          count: int64 scalar, number of batches to train on, 1 to n.

        Returns:
          The outputs of `train_step` for the last of them.
        """
        empty = {name: tf.zeros([]) for name in ("loss", "agreement", "gradient_norm")}
        if self.skipped is not None:
            empty |= self.skipped.empty_figures()
        if "views" in batches:
            empty["views"] = tf.zeros_like(batches["views"][0])
        return run_steps(self.train_step, batches, count, initial=empty)

    def make_train_function(self, force: bool = False) -> Callable[[Iterator[Batch]], dict[str, tf.Tensor]]:
        """Overrides Keras's, so that several compiled steps are one program (see `trainer.step.xla_loop`)."""
        size = int(self.steps_per_execution.numpy())
        if not self.jit_compile or size == 1:
            return super().make_train_function(force)
        if self.train_function is None or force:
            compiled = tf.function(self.train_steps, jit_compile=True)

            @tf.function
            def execute(batches: Iterator[Batch]) -> dict[str, tf.Tensor]:
                # Keras lowers it at the end of an interval.
                count = self.steps_per_execution.read_value()
                return compiled(stack_batches(batches, count, size=size), count)

            self.train_tf_function = self.train_function = execute
        return self.train_function

    def _online_logits(self, views: Any) -> Any:
        """The live teacher's logits float32 [B, C], or a tuple of them."""
        if self._teacher is None:
            raise ValueError("the batch has `stored`, which requires a `teacher`, but the Distiller has none")
        return self._teacher(views)

    def _targets(self, data: dict[str, tf.Tensor], online: Any) -> tf.Tensor:
        """The logits to match, float32 [B, C]: stored ones, or the live teacher's where `stored` is False."""
        if online is None:
            return data["logits"]
        return tf.where(data["stored"][:, tf.newaxis], data["logits"], self._codec(online))


def _agreement(teacher_logits: tf.Tensor, student_logits: tf.Tensor) -> tf.Tensor:
    """Fraction of rows of [B, C] with the same argmax; float32 scalar."""
    same = tf.argmax(teacher_logits, axis=-1) == tf.argmax(student_logits, axis=-1)
    return tf.reduce_mean(tf.cast(same, tf.float32))
