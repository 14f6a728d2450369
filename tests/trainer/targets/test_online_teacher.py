"""trainer.targets.online_teacher: online steps train as offline steps do on the same views."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from pipeline.inputs.dataset import Dataset
from pipeline.inputs.locate import load_teacher
from pipeline.inputs.teacher import Teacher
from pipeline.store.reader import StoreReader
from tests import stores
from trainer import models
from trainer.config.recipes import TrainRecipe
from trainer.step.distiller import Distiller
from trainer.step.loss import DistillationLoss
from trainer.step.optimizers import recipe_optimizer
from trainer.step.schedules import WarmupConstant
from trainer.targets.batches import Targets
from trainer.targets.online_teacher import BatchedTeacher

BATCH = 8
STEPS = 3 * stores.N // BATCH


def open_targets(store: Path, data_dir: Path, *, continued_from: int | None = None) -> Targets:
    dataset = Dataset(stores.DATASET, "train", data_dir=data_dir)
    return Targets(StoreReader(store), dataset, batch_size=BATCH, continued_from=continued_from)


class SyntheticTeacher:
    """A teacher with logits that no store has."""

    def __call__(self, views: tf.Tensor) -> tf.Tensor:
        rows = tf.range(tf.shape(views)[0], dtype=tf.float32)[:, tf.newaxis]
        return rows - 2.0 * tf.range(stores.CLASSES, dtype=tf.float32)


def make_distiller(store: StoreReader, teacher: object, *, rate: float) -> Distiller:
    tf.keras.utils.set_random_seed(0)
    student = models.build_student("tiny", num_classes=stores.CLASSES, image_size=stores.SIZE)
    distiller = Distiller(
        student,
        temperature=2.0,
        temperature_squared=True,
        teacher=teacher,
        round_trip=store.spec.make_codec().round_trip,
    )
    optimizer = recipe_optimizer(TrainRecipe(learning_rate=rate, weight_decay=1e-4), WarmupConstant(0))
    distiller.compile(optimizer=optimizer)
    return distiller


def fit(distiller: Distiller, batches: tf.data.Dataset) -> list[float]:
    """Trains once over the batches and returns the loss of each step."""
    losses: list[float] = []
    record = tf.keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: losses.append(float(logs["loss"]))
    )
    distiller.fit(batches, callbacks=[record], verbose=0)
    return losses


def test_straddling_batch_trains_on_stored_logits_for_stored_views_and_online_ones_for_the_rest(
    one_epoch: Path, data_dir: Path
):
    distiller = make_distiller(StoreReader(one_epoch), SyntheticTeacher(), rate=0.0)
    (batch,) = open_targets(one_epoch, data_dir, continued_from=stores.N).batches(2, 3)
    crops = tf.cast(batch["crops"], tf.float32)
    ratio = batch["ratio"][:, tf.newaxis, tf.newaxis, tf.newaxis]
    views = ratio * crops[:BATCH] + (1 - ratio) * tf.gather(crops, batch["partner"])
    targets = SyntheticTeacher()(views).numpy()
    targets[0] = StoreReader(one_epoch).views.read(np.array([16])).logits[0]
    loss_of = DistillationLoss(2.0, temperature_squared=True)
    losses = loss_of.call(targets, distiller.student(views)).numpy()
    (loss,) = fit(distiller, open_targets(one_epoch, data_dir, continued_from=stores.N).batches(2, 3))
    assert loss == pytest.approx(losses.mean(), rel=1e-5)
    assert abs(losses[0] - losses[1:].mean()) > 0.1  # so that confusing them would fail


def train(targets: Targets, distiller: Distiller) -> list[float]:
    """Trains on all 51 views and returns the loss of each step."""
    online_from = int(min(targets.online_from, STEPS))
    losses = []
    for first, last in ((0, online_from), (online_from, STEPS)):
        if first < last:
            losses += fit(distiller, targets.batches(first, last))
    return losses


def batched(store: StoreReader, teacher_path: Path) -> BatchedTeacher:
    """The teacher as a run wraps it."""
    return BatchedTeacher(load_teacher(store.spec, str(teacher_path)), store.spec.teacher.batch_size)


@pytest.mark.parametrize("count", [1, 3, 4, 5, 8, 11])
def test_teacher_runs_on_batches_of_one_size_and_returns_the_logits_of_every_view(count: int):
    shapes = []

    def teacher(views: tf.Tensor) -> tf.Tensor:
        shapes.append(views.shape.as_list())
        return tf.cast(tf.reduce_sum(views, [1, 2]), tf.float16)

    views = tf.reshape(tf.range(count * 12, dtype=tf.float32), [count, 2, 2, 3])
    wrapped = BatchedTeacher(teacher, 4)
    for call in (wrapped, tf.function(wrapped)):
        logits = call(views)
        assert logits.dtype == tf.float32
        np.testing.assert_array_equal(logits, tf.reduce_sum(views, [1, 2]))
    assert shapes
    assert all(shape == [4, 2, 2, 3] for shape in shapes)
    assert wrapped.padding(count) == (4 - count) % 4


def test_teacher_of_a_fixed_batch_size_runs_on_any_batch(teacher_path: Path, tmp_path: Path):
    inputs = {"image": tf.TensorSpec([stores.BATCH, stores.SIZE, stores.SIZE, 3], tf.float32)}
    path = stores.save_teacher(tmp_path / "fixed", inputs=inputs)
    arguments = {"image_size": stores.SIZE, "num_classes": stores.CLASSES}
    views = tf.random.stateless_uniform([2 * BATCH + 1, stores.SIZE, stores.SIZE, 3], [1, 2], 0, 255)
    fixed = BatchedTeacher(Teacher(path, **arguments), stores.BATCH)
    any_size = BatchedTeacher(Teacher(teacher_path, **arguments), stores.BATCH)
    np.testing.assert_array_equal(fixed(views), any_size(views))


@pytest.mark.usefixtures("deterministic")
def test_offline_training_is_online_training_on_the_same_views(
    float32_store: Path, data_dir: Path, teacher_path: Path
):
    store = StoreReader(float32_store)
    teacher = batched(store, teacher_path)
    offline = train(open_targets(float32_store, data_dir), make_distiller(store, None, rate=0.003))
    online = train(
        open_targets(float32_store, data_dir, continued_from=0), make_distiller(store, teacher, rate=0.003)
    )
    assert len(offline) == STEPS
    assert max(offline) > 1.2 * min(offline)  # it learns
    assert online == offline  # because the teacher ran in batches of the same size


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("codec", ["float16", "topk:3"])
def test_offline_for_an_epoch_and_then_online_is_online_from_the_start(
    make_store: Callable[..., Path], data_dir: Path, teacher_path: Path, codec: str
):
    one_epoch = make_store(codec.replace(":", ""), epochs=1, codec=codec)
    store = StoreReader(one_epoch)  # online logits go through the codec too
    teacher = batched(store, teacher_path)
    both, online = (
        train(
            open_targets(one_epoch, data_dir, continued_from=first),
            make_distiller(store, teacher, rate=0.003),
        )
        for first in (stores.N, 0)
    )
    assert len(both) == STEPS
    assert both == online
