"""trainer.finetuning.finetune: labels, batches and loss; test_teacher_finetune.py tests runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from pipeline.errors import UserError
from pipeline.inputs.dataset import Dataset
from pipeline.views.eval_crop import EvalCrop
from pipeline.views.input import ViewInput
from pipeline.views.policies.inception import Inception
from pipeline.views.policies.light import Light
from pipeline.views.records import SampledViews
from pipeline.views.source import ImageSource
from tests import stores
from tests.images import TEST_IMAGES, encoded_images
from trainer.finetuning.bit_hyperrule import mixup_ratios
from trainer.finetuning.finetune import Classifier, FinetuneOptions, Labels, evaluate_top1, labeled_batches


class FakeDataset:
    """Labels are the index modulo 3, except the last example's, which is missing; records what is read."""

    name, split, num_examples = "fake:1.0.0", "train", 10

    def __init__(self) -> None:
        self.read: list[int] = []

    def labels(self, examples: np.ndarray) -> np.ndarray:
        self.read += examples.tolist()
        return np.where(examples == 9, -1, examples % 3)


def test_labels_are_read_once():
    dataset = FakeDataset()
    labels = Labels(dataset)  # type: ignore[arg-type]
    np.testing.assert_array_equal(labels.read(np.array([4, 1, 4, 8])), [1, 1, 1, 2])
    np.testing.assert_array_equal(labels.read(np.array([8, 0, 1])), [2, 0, 1])
    assert dataset.read == [1, 4, 8, 0]


def test_example_without_a_label_is_named():
    labels = Labels(FakeDataset())  # type: ignore[arg-type]
    labels.read(np.array([1, 2]))
    with pytest.raises(UserError, match=r"`split`=train.* 9 .*fake:1\.0\.0.* 4 .* 1 "):
        labels.read(np.array([1, 9, 3]))


def test_batches_are_a_function_of_the_step_and_carry_both_labels(data_dir: Path):
    dataset = Dataset(stores.DATASET, "train", data_dir=data_dir)
    policy = Light(image_size=12, mixup=False)
    records = SampledViews(policy=policy, seed=0, num_examples=stores.N, num_classes=stores.CLASSES)
    view_input = ViewInput(records, ImageSource(dataset, policy.renderer()), 5)

    def batches(start: int, stop: int) -> list[dict[str, np.ndarray]]:
        made = labeled_batches(view_input, Labels(dataset), start=start, stop=stop, seed=0, alpha=0.1)
        return list(made.as_numpy_iterator())

    whole = batches(0, 5)
    for ours, theirs in zip(batches(2, 5), whole[2:], strict=True):
        for name in theirs:
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    examples = records.examples(np.arange(26))
    for step, batch in enumerate(whole):
        views = np.arange(step * 5, step * 5 + 5)
        partners = np.where(views % stores.N == stores.N - 1, views - stores.N + 1, views + 1)
        np.testing.assert_array_equal(batch["label"], examples[views] % stores.CLASSES)
        np.testing.assert_array_equal(batch["partner_label"], examples[partners] % stores.CLASSES)
        np.testing.assert_array_equal(batch["ratio"], mixup_ratios(views, seed=0, alpha=0.1))


def test_loss_is_the_cross_entropy_with_the_mixed_target():
    inputs = tf.keras.Input([2, 2, 3])
    network = tf.keras.Model(inputs, tf.keras.layers.Dense(4)(tf.keras.layers.Flatten()(inputs)))
    kernel = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32) / 100
    network.set_weights([kernel, np.zeros(4, np.float32)])
    classifier = Classifier(network)
    classifier.compile(optimizer=tf.keras.optimizers.legacy.SGD(0.0))
    crops = np.random.default_rng(1).integers(0, 256, (4, 2, 2, 3)).astype(np.uint8)
    data = {
        "crops": tf.constant(crops),
        "partner": tf.constant([1, 2], tf.int32),
        "ratio": tf.constant([0.25, 1.0]),
        "label": tf.constant([0, 3], tf.int64),
        "partner_label": tf.constant([2, 1], tf.int64),
    }
    got = classifier.train_step(data)
    flat = crops.reshape(4, 12).astype(np.float64)
    logits = np.stack([0.25 * flat[0] + 0.75 * flat[1], flat[1]]) @ kernel
    log_probabilities = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    targets = np.array([[0.25, 0, 0.75, 0], [0, 0, 0, 1]])
    assert float(got["loss"]) == pytest.approx(-(targets * log_probabilities).sum(1).mean(), rel=1e-4)
    assert float(got["accuracy"]) == np.mean(logits.argmax(1) == [2, 3])


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_top1_counts_every_image_once(data_dir: Path, batch_size: int):
    dataset = Dataset(stores.DATASET, "test", data_dir=data_dir)  # 7 images, labels 0 1 2 3 4 0 1
    inputs = tf.keras.Input([12, 12, 3])
    network = tf.keras.Model(
        inputs, tf.keras.layers.Dense(5)(tf.keras.layers.GlobalAveragePooling2D()(inputs))
    )
    network.set_weights([np.zeros((3, 5)), np.array([0, 1, 0, 0, 0])])  # always class 1
    accuracy, unlabeled = evaluate_top1(
        network, dataset, eval_crop=EvalCrop(), image_size=12, batch_size=batch_size
    )
    assert (accuracy, unlabeled) == (pytest.approx(2 / 7), 0)


def test_unlabeled_images_do_not_count(tmp_path: Path):
    images = {"test": encoded_images(TEST_IMAGES)}
    dataset = Dataset(
        stores.DATASET, "test", data_dir=stores.prepare_dataset(tmp_path, images, unlabeled=(1, 4))
    )
    inputs = tf.keras.Input([12, 12, 3])
    network = tf.keras.Model(
        inputs, tf.keras.layers.Dense(5)(tf.keras.layers.GlobalAveragePooling2D()(inputs))
    )
    # Always class 1, which is right for image 6 of the labeled images 0, 2, 3, 5, 6.
    network.set_weights([np.zeros((3, 5)), np.array([0, 1, 0, 0, 0])])
    found = evaluate_top1(network, dataset, eval_crop=EvalCrop(), image_size=12, batch_size=3)
    assert found == (pytest.approx(1 / 5), 2)


def test_options_turn_the_policy_s_own_mixup_off():
    options = FinetuneOptions(policy=Inception(mixup=True), eval_crop=EvalCrop(), steps=5)
    assert not options.policy.mixup
