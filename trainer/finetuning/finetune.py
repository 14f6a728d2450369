"""Supervised fine-tuning on the labels of a data set, which turns a network into a teacher.

It follows BiT's rule for transfer (`trainer.finetuning.bit_hyperrule`). Views come from the project's one renderer, so
view index, seed and policy determine what the network sees, as for a student.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from pipeline.errors import UserError
from pipeline.inputs.dataset import Dataset
from pipeline.inputs.labels import UNLABELED, top1
from pipeline.views.eval_crop import EvalCrop
from pipeline.views.input import Batch, ViewInput
from pipeline.views.mix import mix
from pipeline.views.policies.base import ViewPolicy
from pipeline.views.records import SampledViews
from pipeline.views.source import ImageSource
from trainer.config.choices import BASE_BATCH_SIZE
from trainer.config.run_length import RunLength
from trainer.finetuning.bit_hyperrule import StaircaseDecay, mixup_ratios, rule_mixup_alpha
from trainer.models.layers import head_layer
from trainer.models.randomness import Generators
from trainer.run.callbacks import MetricsLog, RunCallback
from trainer.run.checkpoints import Checkpoints
from trainer.run.evaluation import split_logits
from trainer.run.failures import PREFETCHED, explain
from trainer.run.preemption import Preemption
from trainer.step.schedules import Scaled

_MOMENTUM = 0.9
_UNREAD = UNLABELED - 1  # in place of a label that has not been read yet


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneOptions:
    """Options of a fine-tuning run.

    Attributes:
      policy: Policy of the training views; its own mixup is turned off.
      learning_rate: Rate at the end of the warm-up for 512 views per step, >= 0; scaled in proportion to the batch size.
      image_cache_bytes: Memory for decoded images, used if all of them fit.
      input_buffer_bytes: Memory for batches that are rendered ahead; a quarter of the machine's memory by default.
    """

    policy: ViewPolicy
    eval_crop: EvalCrop
    steps: int
    batch_size: int = BASE_BATCH_SIZE
    learning_rate: float = 0.003
    seed: int = 0
    head_only: bool = False
    log_every: int = 20
    checkpoint_every: int = 100
    image_cache_bytes: int = 0
    input_buffer_bytes: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "policy", dataclasses.replace(self.policy, mixup=False))

    def identity(self) -> dict[str, Any]:
        """Options that must not change when a run is continued. The length is one, because the schedule depends on it."""
        names = ("steps", "batch_size", "learning_rate", "seed", "head_only")
        return {"policy": self.policy.to_json(), **{name: getattr(self, name) for name in names}}


class Labels:
    """Labels by example, each read once."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._known = np.full(dataset.num_examples, _UNREAD, np.int64)

    def read(self, examples: np.ndarray) -> np.ndarray:
        """Examples int64 [n] to labels int64 [n].

        Raises:
          UserError: an example has no label.
        """
        missing = np.unique(examples[self._known[examples] == _UNREAD])
        if len(missing):
            self._known[missing] = self._dataset.labels(missing)
            if (unlabeled := missing[self._known[missing] == UNLABELED]).size:
                raise UserError(
                    f"`split`={self._dataset.split}: example {unlabeled[0]} of {self._dataset.name} has no label; of the "
                    f"{(self._known != _UNREAD).sum():,} examples read so far, {unlabeled.size:,} have none; fine-tuning "
                    "needs a split in which every example is labeled"
                )
        return self._known[examples]


def labeled_batches(
    view_input: ViewInput, labels: Labels, *, start: int, stop: int, seed: int, alpha: float
) -> tf.data.Dataset:
    """The batches of steps `start .. stop - 1`; step `t` trains on views `[t * B, (t + 1) * B)`.

    Args:
      seed: Random seed of the mixup ratios.
      alpha: Of their Beta distribution, see `mixup_ratios`.

    Returns:
      Dicts of `crops` uint8 [K, S, S, 3], `partner` int32 [B], `ratio` float32 [B], and `label` and
      `partner_label`, int64 [B]; K = B + 2.
    """
    size = view_input.batch_size

    def annotate(views: np.ndarray, examples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return labels.read(examples), mixup_ratios(views[:size], seed=seed, alpha=alpha)

    @tf.autograph.experimental.do_not_convert
    def select(batch: Batch) -> Batch:
        label, ratio = tf.numpy_function(
            annotate, [batch["views"], batch["example"]], [tf.int64, tf.float32], stateful=False
        )
        label = tf.ensure_shape(label, [view_input.num_crops])
        return {
            "crops": batch["crops"],
            "partner": batch["partner"],
            "ratio": tf.ensure_shape(ratio, [size]),
            "label": label[:size],
            "partner_label": tf.gather(label, batch["partner"]),
        }

    starts = tf.data.Dataset.range(start * size, stop * size, size)
    return view_input.dataset(starts).map(select)


class Classifier(tf.keras.Model):
    """Trains a network from float32 [B, S, S, 3] in 0..255 to logits [B, C] on the batches of `labeled_batches`."""

    def __init__(self, network: tf.keras.Model) -> None:
        super().__init__(name="classifier")
        self.network = network
        self._generators = Generators(network)

    def call(self, inputs: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        """The network's logits [B, C] for views float32 [B, S, S, 3] in 0..255."""
        return self.network(inputs, training=training)

    def train_step(self, data: Batch) -> dict[str, tf.Tensor]:
        """Performs one update and returns float32 scalars: `loss` (mean cross-entropy in nats) and `accuracy`."""
        views = mix(data["crops"], data["partner"], data["ratio"])
        ratio = data["ratio"]
        if self._generators:
            self._generators.reset(self.optimizer.iterations)
        with tf.GradientTape() as tape:
            logits = tf.cast(self.network(views, training=True), tf.float32)
            # Linear in the target: that of the mixed target is the mixture of the two.
            losses = ratio * _cross_entropy(data["label"], logits)
            losses += (1.0 - ratio) * _cross_entropy(data["partner_label"], logits)
            loss = tf.reduce_mean(losses) + tf.add_n([0.0, *self.network.losses])
        variables = self.network.trainable_variables
        self.optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        main = tf.where(ratio >= 0.5, data["label"], data["partner_label"])
        right = tf.argmax(logits, axis=-1) == main
        return {"loss": loss, "accuracy": tf.reduce_mean(tf.cast(right, tf.float32))}


def _cross_entropy(labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    return tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)


class Finetune:
    """A fine-tuning run, continued from its latest checkpoint.

    Args:
      network: Model from float32 [B, S, S, 3] in 0..255 to logits [B, C]; trained in place.
      workdir: Existing directory for checkpoints, metrics.jsonl and TensorBoard.
      origin: Where the network's initial weights come from; must not change when a run is continued.
    """

    def __init__(
        self,
        network: tf.keras.Model,
        dataset: Dataset,
        *,
        options: FinetuneOptions,
        workdir: Path,
        origin: dict[str, Any],
        preemption: Preemption | None = None,
    ) -> None:
        self._preemption = preemption or Preemption()
        self.network, self.dataset, self.options, self.workdir = network, dataset, options, workdir
        if options.head_only:
            head = head_layer(network)
            for layer in network.layers:
                layer.trainable = layer is head
        self.learning_rate = Scaled(
            options.learning_rate * options.batch_size / BASE_BATCH_SIZE, StaircaseDecay(options.steps)
        )
        optimizer = tf.keras.optimizers.legacy.SGD(self.learning_rate, momentum=_MOMENTUM)
        self._classifier = Classifier(network)
        self._classifier.compile(optimizer=optimizer)
        records = SampledViews(
            policy=options.policy,
            seed=options.seed,
            num_examples=dataset.num_examples,
            num_classes=dataset.num_classes,
        )
        renderer = options.policy.renderer()
        source = ImageSource(dataset, renderer, cache_bytes=options.image_cache_bytes)
        self._input = ViewInput(records, source, options.batch_size, buffer_bytes=options.input_buffer_bytes)
        self._checkpoints = Checkpoints(
            workdir / "checkpoints",
            student=network,
            optimizer=optimizer,
            identity={"dataset": dataset.identity().to_json(), **options.identity(), **origin},
        )

    def latest_step(self) -> int:
        """The step of the latest checkpoint, 0 if there is none."""
        return self._checkpoints.latest_step()

    def restore(self) -> int:
        """Restores the latest checkpoint and returns its step, 0 if there is none."""
        step = self._checkpoints.restore()
        self._checkpoints.remove_leftovers()
        return step

    def train(self, first: int) -> dict[str, Any]:
        """Trains from step `first` to the end and returns the figures for result.json."""
        steps, size = self.options.steps, self.options.batch_size
        if first:
            print(f"continuing at step {first} of {steps}", flush=True)
        callback = RunCallback(
            length=RunLength(
                steps=steps, batch_size=size, num_examples=self.dataset.num_examples, online_from=steps
            ),
            step=first,
            log=MetricsLog(self.workdir, step=first),
            log_every=self.options.log_every,
            checkpoints=self._checkpoints,
            checkpoint_every=self.options.checkpoint_every,
            preemption=self._preemption,
            evaluator=None,
            learning_rate=lambda step: float(self.learning_rate(step)),
        )
        begun = time.monotonic()
        try:
            if first < steps:
                self._fit(first, callback)
        finally:
            callback.close()
        return {"steps": steps, "first_step": first, "seconds": time.monotonic() - begun}

    def _fit(self, first: int, callback: RunCallback) -> None:
        steps = self.options.steps
        batches = labeled_batches(
            self._input,
            Labels(self.dataset),
            start=first,
            stop=steps,
            seed=self.options.seed,
            alpha=rule_mixup_alpha(self.dataset.num_examples),
        )
        try:
            self._classifier.fit(
                batches, epochs=1, steps_per_epoch=steps - first, callbacks=[callback], verbose=0
            )
        except tf.errors.OpError as error:
            raise self._explain(error, callback.step) from error

    def _explain(self, error: Exception, step: int) -> Exception:
        """The cause of an error of TensorFlow's that ended `fit` after `step` steps."""
        size, stop = self.options.batch_size, min(step + PREFETCHED, self.options.steps)
        remedy = f"lower --batch_size ({size} views per step)"
        return explain(error, self._input, first=step * size, stop=stop * size, remedy=remedy)


def evaluate_top1(
    network: tf.keras.Model,
    dataset: Dataset,
    *,
    eval_crop: EvalCrop,
    image_size: int,
    batch_size: int,
) -> tuple[float | None, int]:
    """Top-1 accuracy on the evaluation crops of a split.

    Args:
      network: Model from float32 [B, S, S, 3] in 0..255 to logits [B, C].

    Returns:
      The accuracy on the labeled images, 0..1 (None if there are none), and the number of unlabeled images.
    """
    count = dataset.num_examples
    batches = split_logits(
        network,
        dataset,
        eval_crop=eval_crop,
        image_size=image_size,
        batch_size=batch_size,
        remedy="lower --batch_size",
    )
    progress = tqdm(batches, total=-(-count // batch_size), desc=dataset.split, unit=" batches")
    found = np.concatenate([logits.argmax(axis=1) for logits in progress])
    labels = dataset.labels(np.arange(count))
    return top1(found, labels), int((labels == UNLABELED).sum())
