"""The Keras example that this project began from: function matching with the teacher in each training step.

`knowledge_distillation_recipes` (Sayak Paul 2021, keras.io/examples/keras_recipes/better_knowledge_distillation), written
anew from what it publishes, to be measured against. Optimizer, rate, decay, clipping, temperature and batch are in
`trainer.config.recipes`, `keras_example`; the schedule's formula is `trainer.step.schedules.WarmupCosine`, TFA's AdamW comes from
`trainer.step.optimizers`. Here is what the project does otherwise itself: views that are drawn as they come, and the
teacher's pass.

Other than published, and all of it in the example's favour: the encoded images are in memory, not read in each epoch; the
pipeline goes on from epoch to epoch, and is not started anew in each; images stay in 0..255, which students and
teachers here take, and are not divided by 255; labels, which nothing uses, are not carried along.
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
    """An image of any shape [H, W, 3], 0..255, to a random crop before mixup: float32 [S, S, 3].

    The whole image is resized, its aspect ratio with it; then comes a random window, and a flip in half of the cases.
    """
    canvas = round(CANVAS_SCALE * image_size)
    resized = tf.image.resize(tf.cast(image, tf.float32), [canvas, canvas])
    window = tf.image.random_crop(resized, [image_size, image_size, 3])
    return tf.image.random_flip_left_right(window)


def mix_with_reversed(crops: tf.Tensor) -> tf.Tensor:
    """Mixes a batch float32 [B, S, S, 3] with itself in reversed order, at one ratio from U(0, 1).

    Rows `i` and `B - 1 - i` are two mixtures of the same two crops, at the ratio and its complement; in an odd batch the
    row in the middle is not mixed.
    """
    ratio = tf.random.uniform([])
    return ratio * crops + (1.0 - ratio) * tf.reverse(crops, axis=[0])


def training_batches(encoded: Sequence[bytes], *, image_size: int, batch_size: int) -> tf.data.Dataset:
    """Views, epoch after epoch without end.

    Args:
      encoded: the images of the split.
      image_size: S.
      batch_size: B.

    Returns:
      float32 [B, S, S, 3] in 0..255; the last batch of an epoch has what is left over.
    """

    def render(data: tf.Tensor) -> tf.Tensor:
        # As TFDS decodes the example's images.
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
    """Runs the teacher on each batch of views, and matches the student to its softened probabilities.

    Args:
      student: float32 [B, S, S, 3] in 0..255 -> logits [B, C]; the only weights that are trained.
      teacher: likewise.
      temperature: T; 10 in the example.
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
        """KL at T of two [B, C], summed over the classes, mean over the batch, not times T^2; float32 scalar."""
        targets, predictions = (
            tf.nn.softmax(logits / self._temperature, axis=1) for logits in (teacher_logits, student_logits)
        )
        return self._divergence(targets, predictions)

    def train_step(self, data: tf.Tensor) -> dict[str, tf.Tensor]:
        """One update on views float32 [B, S, S, 3].

        Returns:
          Scalars: `loss`, float32, the mean over the steps since the metrics were reset; `images`, int32, B.
        """
        teacher_logits = self._teacher(data)
        with tf.GradientTape() as tape:
            loss = self.loss_between(teacher_logits, self.student(data, training=True))
        variables = self.student.trainable_variables
        gradients = tape.gradient(loss, variables)
        self.optimizer.apply_gradients(zip(gradients, variables, strict=True))
        self._mean_loss.update_state(loss)
        return {"loss": self._mean_loss.result(), "images": tf.shape(data)[0]}
