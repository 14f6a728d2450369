"""trainer.run.evaluation: figures are compared with NumPy, and do not depend on the batches."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from pipeline.errors import DataError
from pipeline.inputs.dataset import Dataset
from pipeline.store.reader import StoreReader
from pipeline.views.render import Window, eval_renderer
from tests import stores
from tests.images import TEST_IMAGES, TRAIN_IMAGES, encoded_images
from trainer import models
from trainer.run.evaluation import Evaluator, unlabeled_text

COUNT = len(TEST_IMAGES)
LABELS = np.arange(COUNT) % stores.CLASSES
TEMPERATURE = 2.0
CACHE = 1 << 30


def make_evaluator(
    store: Path,
    data_dir: Path,
    *,
    batch_size: int = 3,
    cache: int = CACHE,
    temperature: float = TEMPERATURE,
    squared: bool = False,
) -> Evaluator:
    return Evaluator(
        StoreReader(store),
        Dataset(stores.DATASET, "test", data_dir=data_dir),
        batch_size=batch_size,
        temperature=temperature,
        temperature_squared=squared,
        cache_bytes=cache,
    )


@pytest.fixture(scope="module")
def crops(published_store: Path) -> np.ndarray:
    """Evaluation crops, rendered without an input pipeline: uint8 [7, S, S, 3]."""
    spec = StoreReader(published_store).spec
    renderer = eval_renderer(spec.eval_crop, stores.SIZE)
    out = []
    for encoded in encoded_images(TEST_IMAGES, seed=50):
        height, width = tf.io.decode_image(encoded, channels=3, expand_animations=False).shape[:2]
        (box,) = spec.eval_crop.boxes(np.array([[height, width]], np.int32), stores.SIZE)
        out.append(renderer.finish(renderer.cut(tf.constant(encoded), Window.of(box))).numpy())
    return np.stack(out)


@pytest.fixture(scope="module")
def student(crops: np.ndarray) -> tf.keras.Model:
    """A student with different predictions for different images."""
    tf.keras.utils.set_random_seed(3)
    student = models.build_student("tiny", num_classes=stores.CLASSES, image_size=stores.SIZE)
    *body, kernel, bias = student.get_weights()
    student.set_weights([*body, 20 * kernel, bias])
    mean = student(crops.astype(np.float32), training=False).numpy().mean(axis=0)
    student.set_weights([*body, 20 * kernel, bias - mean])
    return student


def all_logits(evaluator: Evaluator, student: tf.keras.Model) -> tuple[np.ndarray, np.ndarray]:
    ours, theirs = zip(*evaluator.logits(student), strict=True)
    return np.concatenate(ours), np.concatenate(theirs)


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits.astype(np.float64) / TEMPERATURE)
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def test_figures_are_numpy_s(
    published_store: Path, data_dir: Path, student: tf.keras.Model, crops: np.ndarray, teacher_path: Path
):
    images = crops.astype(np.float32)
    ours = student(images, training=False).numpy()
    theirs = stores.PlainTeacher()(tf.constant(images)).numpy()
    p, q = softmax(theirs), softmax(ours)
    found = make_evaluator(published_store, data_dir).evaluate(student)
    assert found["examples"] == COUNT
    assert found["student_top1"] == np.mean(ours.argmax(1) == LABELS)
    assert found["teacher_top1"] == np.mean(theirs.argmax(1) == LABELS)
    assert found["agreement"] == np.mean(ours.argmax(1) == theirs.argmax(1))
    loss = np.mean((p * np.log(p / q)).sum(axis=1))
    assert found["distillation_loss"] == pytest.approx(loss, rel=1e-3)  # the store's logits are float16
    assert len(set(ours.argmax(1))) > 2
    assert found["student_top1"] != found["teacher_top1"]


@pytest.mark.parametrize(
    ("batch_size", "cache"),
    [(1, CACHE), (2, 0), (2, CACHE), (256, 0)],
    ids=["single", "last_is_partial", "last_is_partial_kept", "more_than_all"],
)
def test_batch_size_and_cache_change_nothing(
    published_store: Path, data_dir: Path, student: tf.keras.Model, batch_size: int, cache: int
):
    expected_ours, expected_theirs = all_logits(make_evaluator(published_store, data_dir), student)
    evaluator = make_evaluator(published_store, data_dir, batch_size=batch_size, cache=cache)
    for _ in range(2):  # the second time from the cache
        ours, theirs = all_logits(evaluator, student)
        assert ours.shape == theirs.shape == (COUNT, stores.CLASSES)
        np.testing.assert_allclose(ours, expected_ours, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(theirs, expected_theirs)


def test_evaluation_and_predictions_hold_the_logits_of_one_batch(
    published_store: Path,
    data_dir: Path,
    student: tf.keras.Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    alive: list[weakref.ref[np.ndarray]] = []
    most = 0
    original = Evaluator.logits

    def watched(self: Evaluator, student: tf.keras.Model) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        nonlocal most
        for ours, theirs in original(self, student):
            assert len(ours) == len(theirs) == 1
            alive.append(weakref.ref(ours))
            most = max(most, sum(ref() is not None for ref in alive))
            yield ours, theirs

    monkeypatch.setattr(Evaluator, "logits", watched)
    evaluator = make_evaluator(published_store, data_dir, batch_size=1, cache=0)
    evaluator.evaluate(student)
    evaluator.write_predictions(tmp_path / "predictions.npz")
    assert len(alive) == COUNT
    assert most <= 3  # the current batch, and those that variables in generator and caller still refer to


def test_teacher_logits_count_towards_the_cache(
    published_store: Path, data_dir: Path, student: tf.keras.Model
):
    crops = COUNT * stores.SIZE**2 * 3
    for cache, kept in ((crops, 0), (crops + 4 * COUNT * stores.CLASSES, COUNT)):
        evaluator = make_evaluator(published_store, data_dir, batch_size=1, cache=cache)
        evaluator.evaluate(student)
        assert len(evaluator._kept) == kept


def test_changed_weights_change_the_evaluation(
    published_store: Path, data_dir: Path, student: tf.keras.Model
):
    evaluator = make_evaluator(published_store, data_dir)
    before = evaluator.evaluate(student)
    weights = student.get_weights()
    try:
        # Always class 4, which is correct for example 4 of 7.
        student.set_weights([*weights[:-1], np.eye(stores.CLASSES, dtype=np.float32)[4] * 1e3])
        after = evaluator.evaluate(student)
    finally:
        student.set_weights(weights)
    assert after["student_top1"] == pytest.approx(1 / COUNT)
    assert after["teacher_top1"] == before["teacher_top1"]
    assert evaluator.evaluate(student) == before


def test_loss_is_scaled_as_in_training(published_store: Path, data_dir: Path, student: tf.keras.Model):
    plain = make_evaluator(published_store, data_dir).evaluate(student)
    squared = make_evaluator(published_store, data_dir, squared=True).evaluate(student)
    assert squared["distillation_loss"] == pytest.approx(
        plain["distillation_loss"] * TEMPERATURE**2, rel=1e-5
    )


@pytest.mark.parametrize("unlabeled", [(0, 3), range(COUNT)], ids=["some", "all"])
def test_unlabeled_images_are_excluded_from_accuracy_and_counted(
    published_store: Path,
    data_dir: Path,
    student: tf.keras.Model,
    tmp_path: Path,
    unlabeled: Collection[int],
):
    """The same images with fewer labels."""
    images = {
        "train": encoded_images(TRAIN_IMAGES),
        "test": encoded_images(TEST_IMAGES, seed=50),
    }
    stores.prepare_dataset(tmp_path, images, unlabeled=unlabeled)
    labeled = [example for example in range(COUNT) if example not in unlabeled]
    before, after = (make_evaluator(published_store, path) for path in (data_dir, tmp_path))
    ours, theirs = all_logits(before, student)
    found = after.evaluate(student)
    assert (found["examples"], found["unlabeled"]) == (COUNT, len(unlabeled))
    assert found["agreement"] == before.evaluate(student)["agreement"]
    for value, logits in ((found["student_top1"], ours), (found["teacher_top1"], theirs)):
        right = (logits.argmax(1) == LABELS)[labeled]
        assert value == (right.mean() if labeled else None)
    assert f"{len(unlabeled)} of {COUNT}" in unlabeled_text(found)
    assert unlabeled_text(before.evaluate(student)) == ""


@pytest.mark.parametrize("cache", [0, CACHE], ids=["rendered_each_time", "kept"])
def test_other_pixels_are_refused_with_both_fingerprints(
    published_store: Path, forged_data_dir: Path, student: tf.keras.Model, cache: int
):
    stored = StoreReader(published_store).eval_reader("test").read(np.array([0]))
    with pytest.raises(DataError) as error:
        make_evaluator(published_store, forged_data_dir, cache=cache).evaluate(student)
    assert "view 0 (example 0): source fingerprint is " in str(error.value)
    assert f"{stored.source_hash[0]:08x} in the store" in str(error.value)
