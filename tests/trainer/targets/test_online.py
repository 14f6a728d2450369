"""trainer.targets.online: past the last stored view the same sequence goes on, with the teacher's logits made now."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from pipeline.errors import DataError
from pipeline.errors.causes import find_error
from pipeline.inputs.dataset import Dataset
from pipeline.inputs.locate import load_teacher
from pipeline.inputs.teacher import Teacher
from pipeline.store.reader import Store
from pipeline.views.input import ViewInput
from tests import stores
from tests.runs import assert_same_batches, forge_records, numpy_batches
from trainer import models
from trainer.step.distiller import Distiller, distillation_loss
from trainer.step.optimizers import make_optimizer
from trainer.step.schedules import WarmupConstant
from trainer.targets.online import BatchedTeacher, ContinuedViews
from trainer.targets.replay import replay_input, step_batches

BATCH = 8
VIEWS = 3 * stores.N
STEPS = VIEWS // BATCH
CACHE = 1 << 30


def replayed(store: Path, data_dir: Path) -> ViewInput:
    dataset = Dataset(stores.DATASET, "train", data_dir=data_dir)
    return replay_input(Store(store), dataset, batch_size=BATCH, image_cache_bytes=0)


def continued(store: Path, data_dir: Path, *, first_sampled: int | None = None, cache: int = 0) -> ViewInput:
    opened = Store(store)
    return replay_input(
        opened,
        Dataset(stores.DATASET, "train", data_dir=data_dir),
        batch_size=BATCH,
        image_cache_bytes=cache,
        records=ContinuedViews.of(opened, first_sampled=first_sampled),
    )


@pytest.mark.parametrize("cache", [0, CACHE], ids=["encoded", "cached"])
@pytest.mark.parametrize(
    "first_sampled", [0, 5, None], ids=["from_the_start", "inside_an_epoch", "after_one"]
)
def test_sampled_views_are_those_of_a_longer_store(
    one_epoch: Path, three_epochs: Path, data_dir: Path, first_sampled: int | None, cache: int
):
    stored = numpy_batches(replayed(three_epochs, data_dir), 0, STEPS)
    view_input = continued(one_epoch, data_dir, first_sampled=first_sampled, cache=cache)
    batches = numpy_batches(view_input, 0, STEPS, with_stored=True)
    border = stores.N if first_sampled is None else first_sampled
    for step, (ours, theirs) in enumerate(zip(batches, stored, strict=True)):
        views = np.arange(step * BATCH, (step + 1) * BATCH)
        for name in ("crops", "partner", "ratio"):
            np.testing.assert_array_equal(ours[name], theirs[name])
        np.testing.assert_array_equal(ours["stored"], views < border)
        kept = ours["stored"][:, np.newaxis]
        np.testing.assert_array_equal(ours["logits"], np.where(kept, theirs["logits"], 0))


def test_a_batch_straddles_the_end_of_the_store(one_epoch: Path, data_dir: Path):
    (batch,) = numpy_batches(continued(one_epoch, data_dir), 2, 3, with_stored=True)  # views 16..23 of 17
    assert batch["stored"].tolist() == [True] + [False] * 7
    assert batch["logits"][0].any()
    assert not batch["logits"][1:].any()


def test_resumed_run_sees_the_same_batches_on_either_side_of_the_border(one_epoch: Path, data_dir: Path):
    steps = 6  # 0 and 1 stored, 2 straddles, the rest sampled; epochs end in 2 and 4
    whole = numpy_batches(continued(one_epoch, data_dir), 0, steps, with_stored=True)
    fresh = continued(one_epoch, data_dir)
    for step in range(steps):
        assert_same_batches(numpy_batches(fresh, step, steps, with_stored=True), whole[step:])


def test_stored_views_of_a_straddling_batch_are_verified(store: Path, data_dir: Path):
    forge_records(store, 50, crop_hash=0xDEADBEEF)
    with pytest.raises(tf.errors.OpError) as caught:
        numpy_batches(continued(store, data_dir), 6, 7, with_stored=True)  # views 48..55 of 51
    found = find_error(caught.value)
    assert isinstance(found, DataError)
    assert "view 50 " in str(found)
    assert "deadbeef" in str(found)


class RecordedTeacher:
    """Logits that no store holds."""

    def __call__(self, views: tf.Tensor) -> tf.Tensor:
        rows = tf.range(tf.shape(views)[0], dtype=tf.float32)[:, tf.newaxis]
        return rows - 2.0 * tf.range(stores.CLASSES, dtype=tf.float32)


def make_distiller(store: Store, teacher: object, *, rate: float) -> Distiller:
    tf.keras.utils.set_random_seed(0)
    student = models.build("tiny", num_classes=stores.CLASSES, image_size=stores.SIZE)
    distiller = Distiller(
        student,
        temperature=2.0,
        temperature_squared=True,
        teacher=teacher,
        round_trip=store.spec.make_codec().round_trip,
    )
    optimizer = make_optimizer(
        rate,
        schedule=WarmupConstant(0),
        weight_decay=1e-4,
        decay_mode="scaled",
        decay_kernels_only=True,
        clip="global",
        clip_norm=1.0,
    )
    distiller.compile(optimizer=optimizer)
    return distiller


def fit(distiller: Distiller, batches: tf.data.Dataset) -> list[float]:
    """Trains once over the batches; the loss of each step."""
    losses: list[float] = []
    record = tf.keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: losses.append(float(logs["loss"]))
    )
    distiller.fit(batches, callbacks=[record], verbose=0)
    return losses


def test_straddling_batch_trains_on_stored_logits_for_stored_views_and_online_ones_for_the_rest(
    one_epoch: Path, data_dir: Path
):
    distiller = make_distiller(Store(one_epoch), RecordedTeacher(), rate=0.0)
    (batch,) = step_batches(continued(one_epoch, data_dir), 2, 3, with_stored=True)
    crops = tf.cast(batch["crops"], tf.float32)
    ratio = batch["ratio"][:, tf.newaxis, tf.newaxis, tf.newaxis]
    views = ratio * crops[:BATCH] + (1 - ratio) * tf.gather(crops, batch["partner"])
    targets = RecordedTeacher()(views).numpy()
    targets[0] = Store(one_epoch).views.read(np.array([16])).logits[0]
    losses = distillation_loss(
        targets, distiller.student(views), temperature=2.0, temperature_squared=True
    ).numpy()
    (loss,) = fit(distiller, step_batches(continued(one_epoch, data_dir), 2, 3, with_stored=True))
    assert loss == pytest.approx(losses.mean(), rel=1e-5)
    assert abs(losses[0] - losses[1:].mean()) > 0.1  # so that mixing them up would show


def train(view_input: ViewInput, distiller: Distiller, *, online_from: int) -> list[float]:
    """The loss of each step of a run over the 51 views."""
    losses = []
    for first, last in ((0, online_from), (online_from, STEPS)):
        if first < last:
            losses += fit(distiller, step_batches(view_input, first, last, with_stored=first >= online_from))
    return losses


def batched(store: Store, teacher_path: Path) -> BatchedTeacher:
    """The teacher as a run has it."""
    return BatchedTeacher(load_teacher(store.spec, str(teacher_path)), store.spec.teacher.batch_size)


@pytest.mark.parametrize("count", [1, 3, 4, 5, 8, 11])
def test_teacher_sees_batches_of_one_size_and_gives_every_view_its_logits(count: int):
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
    store = Store(float32_store)
    teacher = batched(store, teacher_path)
    offline = train(
        replayed(float32_store, data_dir), make_distiller(store, None, rate=0.003), online_from=STEPS
    )
    online = train(
        continued(float32_store, data_dir, first_sampled=0),
        make_distiller(store, teacher, rate=0.003),
        online_from=0,
    )
    assert len(offline) == STEPS
    assert max(offline) > 1.2 * min(offline)  # it does learn
    assert online == offline  # the teacher ran in batches of the same size


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("codec", ["float16", "topk:3"])
def test_offline_for_an_epoch_and_then_online_is_online_from_the_start(
    make_store: Callable[..., Path], data_dir: Path, teacher_path: Path, codec: str
):
    one_epoch = make_store(codec.replace(":", ""), epochs=1, codec=codec)
    store = Store(one_epoch)  # what is made online has to go through the codec alike
    teacher = batched(store, teacher_path)
    both = train(
        continued(one_epoch, data_dir),
        make_distiller(store, teacher, rate=0.003),
        online_from=stores.N // BATCH,
    )
    online = train(
        continued(one_epoch, data_dir, first_sampled=0),
        make_distiller(store, teacher, rate=0.003),
        online_from=0,
    )
    assert len(both) == STEPS
    assert both == online
