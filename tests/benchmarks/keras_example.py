"""The Keras example of function matching, with the teacher in each training step: a baseline for benchmarks.

A new implementation of the published `knowledge_distillation_recipes` (Sayak Paul 2021,
keras.io/examples/keras_recipes/better_knowledge_distillation). Optimizer, learning rate, decay, clipping, temperature and
batch size are in the recipe `keras_example` of `trainer.config.recipes`. The formula of the schedule is
`trainer.step.schedules.WarmupCosine`, and TFA's AdamW comes from `trainer.step.optimizers`. This module has the parts that
the project replaces: views drawn on the fly, and the teacher's forward pass.

It differs from the published example in four ways, all in favor of the example. Encoded images are in memory instead of
being read in each epoch. One pipeline runs over all epochs. Images stay in 0..255, the range of the students and teachers
of this project. Unused labels are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tensorflow as tf

# "Hyperparameters and constants": BIGGER = 160 for RESIZE = 128.
CANVAS_SCALE = 1.25
# "Data input pipeline": crops are shuffled in a buffer of BATCH_SIZE * 10.
SHUFFLED_BATCHES = 10
# "Learning rate schedule": 1000 epochs of 1,020 images in batches of 512, though the example trains in batches of 64 and
# for 30 epochs; 1,500 of the steps are the warm-up. Peak 0.003, from 0.
SCHEDULE_STEPS = int(1020 / 512 * 1000)
WARMUP_STEPS = 1500


def random_view(image: tf.Tensor, *, image_size: int) -> tf.Tensor:
    """Draws a random crop, before mixup.

    Resizes the whole image to a square, takes a random window, and flips it with probability 1/2.

    Args:
      image: [H, W, 3] in 0..255.
      image_size: S.

    Returns:
      float32 [S, S, 3].
    """
    canvas = round(CANVAS_SCALE * image_size)
    resized = tf.image.resize(tf.cast(image, tf.float32), [canvas, canvas])
    window = tf.image.random_crop(resized, [image_size, image_size, 3])
    return tf.image.random_flip_left_right(window)


def mix_with_reversed(crops: tf.Tensor) -> tf.Tensor:
    """Mixes a batch float32 [B, S, S, 3] with itself in reversed order, at one ratio from U(0, 1).

    Rows `i` and `B - 1 - i` are mixtures of the same two crops, at the ratio and at its complement. In an odd batch, the
    middle row stays unmixed.
    """
    ratio = tf.random.uniform([])
    return ratio * crops + (1.0 - ratio) * tf.reverse(crops, axis=[0])


def training_batches(encoded: Sequence[bytes], *, image_size: int, batch_size: int) -> tf.data.Dataset:
    """Batches of mixed views, repeated without end.

    Args:
      encoded: Encoded images of the split.
      image_size: S.
      batch_size: B.

    Returns:
      float32 [B, S, S, 3] in 0..255. The last batch of an epoch has the remaining views.
    """

    def render(data: tf.Tensor) -> tf.Tensor:
        # TFDS decodes the example's images in the same way.
        image = tf.io.decode_image(data, channels=3, expand_animations=False)
        return random_view(image, image_size=image_size)

    return (
        tf.data.Dataset.from_tensor_slices(list(encoded))
        .map(render, num_parallel_calls=tf.data.AUTOTUNE)
        .shuffle(SHUFFLED_BATCHES * batch_size)
        .batch(batch_size)
        .map(mix_with_reversed, num_parallel_calls=tf.data.AUTOTUNE)
        .repeat()
        .prefetch(tf.data.AUTOTUNE)
    )


class OnlineDistiller(tf.keras.Model):
    """Runs the teacher on each batch of views and trains the student on its softened probabilities.

    Args:
      student: Trained model, float32 [B, S, S, 3] in 0..255 to logits [B, C].
      teacher: Frozen model with the same signature.
      temperature: T, which is 10 in the example.
    """

    def __init__(
        self, student: tf.keras.Model, teacher: Callable[[tf.Tensor], tf.Tensor], *, temperature: float
    ) -> None:
        super().__init__(name="online_distiller")
        self.student = student
        self._teacher = teacher
        self._temperature = temperature
        self._divergence = tf.keras.losses.KLDivergence()
        self._mean_loss = tf.keras.metrics.Mean(name="loss")

    def loss_between(self, teacher_logits: tf.Tensor, student_logits: tf.Tensor) -> tf.Tensor:
        """KL divergence at T of logits [B, C], summed over classes, mean over the batch, not multiplied by T^2."""
        targets, predictions = (
            tf.nn.softmax(logits / self._temperature, axis=1) for logits in (teacher_logits, student_logits)
        )
        return self._divergence(targets, predictions)

    def train_step(self, data: tf.Tensor) -> dict[str, tf.Tensor]:
        """Trains on a batch of views, float32 [B, S, S, 3].

        Returns:
          `loss`, float32, the mean over the steps since the last reset of the metrics; `images`, int32, B.
        """
        teacher_logits = self._teacher(data)
        with tf.GradientTape() as tape:
            loss = self.loss_between(teacher_logits, self.student(data, training=True))
        variables = self.student.trainable_variables
        gradients = tape.gradient(loss, variables)
        self.optimizer.apply_gradients(zip(gradients, variables, strict=True))
        self._mean_loss.update_state(loss)
        return {"loss": self._mean_loss.result(), "images": tf.shape(data)[0]}
