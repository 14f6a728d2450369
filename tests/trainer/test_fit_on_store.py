"""The public API in a user's own training: a Keras model that knows nothing of this project, with plain `fit`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from pipeline import open_store
from tests import runs, stores
from trainer import DistillationLoss, Distiller, build_student
from trainer.step.optimizers import recipe_optimizer
from trainer.targets.batches import Targets
from trainer.train import main

BATCH = 5
STEPS = 6


def mobilenet() -> tf.keras.Model:
    """A model of `tf.keras.applications` on views in 0..255, the same weights each time."""
    tf.keras.utils.set_random_seed(3)
    net = tf.keras.applications.MobileNetV2(
        input_shape=(32, 32, 3),
        alpha=0.35,
        weights=None,
        classes=stores.CLASSES,
        classifier_activation=None,
    )
    views = tf.keras.Input([stores.SIZE, stores.SIZE, 3])
    scaled = tf.keras.layers.Rescaling(1 / 127.5, offset=-1)(tf.keras.layers.ZeroPadding2D(4)(views))
    return tf.keras.Model(views, net(scaled))


def step_losses(model: tf.keras.Model, data: tf.data.Dataset) -> list[float]:
    """Loss of each step: an epoch of Keras is one step."""
    losses: list[float] = model.fit(data, epochs=STEPS, steps_per_epoch=1, verbose=0).history["loss"]
    return losses


@pytest.mark.slow
def test_fit_of_a_keras_model_matches_the_distiller(published_store: Path, data_dir: Path, deterministic):
    store = open_store(published_store, data_dir=data_dir)
    plain = mobilenet()
    plain.compile("adam", loss=DistillationLoss(temperature=store.temperature))
    found = step_losses(plain, store.as_dataset(batch_size=BATCH, epochs=2))

    student = mobilenet()
    distiller = Distiller(student, temperature=store.temperature, temperature_squared=False)
    distiller.compile(optimizer="adam")
    targets = Targets(store.reader, store.dataset, batch_size=BATCH)
    expected = step_losses(distiller, targets.batches(0, STEPS))

    assert len(set(expected)) == STEPS
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    for ours, theirs in zip(plain.trainable_weights, student.trainable_weights, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_fit_of_a_built_in_student_matches_the_command(
    published_store: Path, data_dir: Path, tmp_path: Path, deterministic
):
    argv = runs.arguments(
        published_store, tmp_path / "run", data_dir, f"--steps={STEPS}", "--log_every=1", "--warmup_steps=2"
    )
    assert main([*argv, "--deterministic"]) == 0
    expected = runs.losses(tmp_path / "run")

    store = open_store(published_store, data_dir=data_dir)
    options = runs.options(argv, store.reader)
    recipe = options.recipe
    tf.keras.utils.set_random_seed(0)
    student = build_student("tiny", num_classes=stores.CLASSES, image_size=stores.SIZE)
    optimizer = recipe_optimizer(recipe, options.schedule.multiplier())
    student.compile(
        optimizer, loss=DistillationLoss(options.temperature, temperature_squared=recipe.temperature_squared)
    )
    found = step_losses(student, store.as_dataset(batch_size=BATCH))
    np.testing.assert_allclose(found, list(expected.values()), rtol=1e-4)
