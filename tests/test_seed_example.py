"""The Keras example that benchmarks/seed_example.py compares with: its parts, and the benchmark on a small store."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from pipeline.views.mix import mix
from tests import runs, stores
from tests.benchmarks import keras_example
from trainer import models
from trainer.config.recipes import train_recipe
from trainer.step.distiller import Distiller
from trainer.step.loss import DistillationLoss
from trainer.step.optimizers import recipe_optimizer
from trainer.step.schedules import WarmupConstant, WarmupCosine

BENCHMARK = runs.ROOT / "tests/benchmarks/seed_example.py"
SIZE = stores.SIZE


@pytest.fixture(autouse=True)
def _seeded():
    tf.keras.utils.set_random_seed(3)


def random_crops(count: int) -> tf.Tensor:
    """Random crops, float32 [count, S, S, 3], whole numbers in 0..255."""
    return tf.cast(tf.random.uniform([count, SIZE, SIZE, 3], 0, 256, tf.int32), tf.float32)


def optimizer() -> Any:
    """The example's optimizer, at its peak rate from the first step."""
    recipe = train_recipe("keras_example")
    return recipe_optimizer(recipe, WarmupConstant(0))


def student() -> tf.keras.Model:
    return models.build_student("tiny", num_classes=stores.CLASSES, image_size=SIZE)


def test_reversed_batch_gives_each_pair_twice_in_complementary_mixtures():
    crops = random_crops(7)
    views = keras_example.mix_with_reversed(crops)
    for row in range(7):
        pair = crops[row] + crops[6 - row]
        np.testing.assert_allclose(views[row] + views[6 - row], pair, atol=1e-3)
    np.testing.assert_allclose(views[3], crops[3], atol=1e-3)  # the middle view is its own partner
    assert np.abs(views[0] - crops[0]).max() > 1


def test_ratio_is_one_a_batch_and_uniform():
    crops = tf.constant([0.0, 1.0, 0.0, 1.0])[:, tf.newaxis, tf.newaxis, tf.newaxis]
    ratios = []
    for _ in range(400):
        views = keras_example.mix_with_reversed(crops)[:, 0, 0, 0].numpy()
        np.testing.assert_allclose(views, [1 - views[1], views[1], 1 - views[1], views[1]], atol=1e-6)
        ratios.append(views[1])
    # Quartiles of U(0, 1), not folded: with 400 draws, the median has a standard deviation of 0.022.
    np.testing.assert_allclose(
        np.quantile(ratios, [0, 0.25, 0.5, 0.75, 1]), [0, 0.25, 0.5, 0.75, 1], atol=0.1
    )


def test_view_is_a_window_of_the_resized_image_mirrored_in_half_of_the_cases():
    image = tf.cast(tf.random.uniform([31, 47, 3], 0, 256, tf.int32), tf.uint8)
    canvas = tf.image.resize(image, [30, 30]).numpy()  # 1.25 * 24
    windows = {
        (y, x): canvas[y : y + SIZE, x : x + SIZE] for y in range(30 - SIZE + 1) for x in range(30 - SIZE + 1)
    }
    seen = []
    for _ in range(60):
        view = keras_example.random_view(image, image_size=SIZE).numpy()
        seen += [
            (corner, mirrored)
            for corner, window in windows.items()
            for mirrored in (False, True)
            if np.array_equal(view, window[:, ::-1] if mirrored else window)
        ]
    assert len(seen) == 60
    assert 15 < sum(mirrored for _, mirrored in seen) < 45
    corners = {corner for corner, _ in seen}
    assert {y for y, _ in corners} == set(range(7)) == {x for _, x in corners}


def test_an_epoch_shows_each_image_once_and_ends_in_a_short_batch():
    # Each image has one color, so that the sum over the views of a batch is the sum of its colors, also after mixing.
    levels = np.arange(1, 12) ** 2
    encoded = [tf.io.encode_png(tf.fill([5, 9, 3], tf.cast(level, tf.uint8))).numpy() for level in levels]
    batches = iter(keras_example.training_batches(encoded, image_size=SIZE, batch_size=4))
    epochs = []
    for _ in range(3):
        views = [next(batches).numpy() for _ in range(3)]
        assert [len(batch) for batch in views] == [4, 4, 3]
        assert all(batch.shape[1:] == (SIZE, SIZE, 3) for batch in views)
        sums = [batch[:, 0, 0, 0].sum() for batch in views]
        assert sum(sums) == pytest.approx(levels.sum(), abs=0.01)
        epochs.append(tuple(np.rint(sums)))
    assert len(set(epochs)) == 3  # shuffled again


def test_schedule_has_the_published_values():
    total, warmup, peak = keras_example.SCHEDULE_STEPS, keras_example.WARMUP_STEPS, 0.003
    assert (total, warmup) == (1992, 1500)
    rates = peak * WarmupCosine(total, warmup)(np.arange(2100)).numpy()
    steps = np.arange(total + 1)
    published = np.where(
        steps < warmup,
        peak / warmup * steps,
        peak / 2 * (1 + np.cos(np.pi * (steps - warmup) / (total - warmup))),
    )
    np.testing.assert_allclose(rates[: total + 1], published, atol=1e-9)
    np.testing.assert_array_equal(rates[total:], 0)
    np.testing.assert_allclose(
        rates[[0, 480, 750, 1500, 1746]], [0, 0.00096, 0.0015, 0.003, 0.0015], atol=1e-9
    )


@pytest.mark.parametrize("temperature", [1.0, 10.0])
def test_loss_is_the_trainers_without_the_square_of_the_temperature(temperature: float):
    distiller = keras_example.OnlineDistiller(student(), tf.identity, temperature=temperature)
    theirs, ours = 4 * tf.random.normal([9, 5]), 4 * tf.random.normal([9, 5])
    expected = DistillationLoss(temperature).call(theirs, ours)
    # Keras clips probabilities at 1e-7.
    np.testing.assert_allclose(
        distiller.loss_between(theirs, ours), tf.reduce_mean(expected), rtol=1e-4, atol=1e-6
    )


def test_same_views_and_logits_give_the_weights_that_the_trainer_gives():
    teacher = stores.PlainTeacher()
    first, second = student(), student()
    second.set_weights(first.get_weights())
    online = keras_example.OnlineDistiller(first, teacher, temperature=10.0)
    offline = Distiller(second, temperature=10.0)
    for distiller in (online, offline):
        distiller.compile(optimizer=optimizer())
    before = first.get_weights()
    losses = []
    for ratio in (0.2, 0.7, 0.4):
        batch = {
            "crops": tf.cast(random_crops(6), tf.uint8),
            "partner": tf.range(5, -1, -1),
            "ratio": tf.fill([6], ratio),
        }
        views = mix(**batch)
        online.reset_metrics()
        figures = online.train_step(views)
        assert int(figures["images"]) == 6
        losses.append((figures["loss"], offline.train_step({**batch, "logits": teacher(views)})["loss"]))
    np.testing.assert_allclose(*zip(*losses, strict=True), rtol=1e-3)
    for ours, theirs, start in zip(first.get_weights(), second.get_weights(), before, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-4)
        assert np.abs(ours - start).max() > 1e-3


def test_it_learns_and_leaves_the_teacher_alone():
    images = stores.encoded_images(stores.TRAIN_IMAGES)
    teacher = stores.PlainTeacher()
    distiller = keras_example.OnlineDistiller(student(), teacher, temperature=10.0)
    distiller.compile(optimizer=optimizer())
    step = distiller.make_train_function()
    batches = iter(keras_example.training_batches(images, image_size=SIZE, batch_size=5))
    losses = []
    for _ in range(40):
        distiller.reset_metrics()
        losses.append(float(step(batches)["loss"]))
    assert np.mean(losses[-10:]) < 0.3 * np.mean(losses[:3])
    for weight, start in zip(teacher.weights, stores.teacher_weights(), strict=True):
        np.testing.assert_array_equal(weight, start)


def arguments(store: Path, data_dir: Path, teacher: Path, *extra: str) -> list[str]:
    """Arguments of the benchmark on a small store."""
    paths = [f"--store={store}", f"--data_dir={data_dir}", f"--teacher={teacher}"]
    return [*paths, "--student=tiny", "--batch_size=5", *extra]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of the benchmark, which imports its neighbors as a script does."""
    monkeypatch.syspath_prepend(str(BENCHMARK.parent))
    return importlib.import_module("seed_example")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ([], "--recipe=keras_example"),
        (["--epochs=2"], "--epochs"),
        (["--secnods=2"], "--seconds?"),
    ],
)
def test_mistake_ends_the_command_in_one_line(
    benchmark: Any,
    extra: list[str],
    message: str,
    published_store: Path,
    data_dir: Path,
    teacher_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    argv = arguments(published_store, data_dir, teacher_path, *extra)
    code, line = runs.fail(argv, capsys, main=benchmark.main)
    assert code == 2
    assert message in line


def test_fitted_schedules_end_where_a_sides_time_does(benchmark: Any):
    rates = {"example": [60.0, 64.0, 90.0], "offline": [128.0, 120.0, 130.0]}
    fitted = benchmark.choose_schedules("fitted", rates, seconds=100, batch_size=64)
    assert fitted == {"example": WarmupCosine(100, 5), "offline": WarmupCosine(200, 10)}
    published = benchmark.choose_schedules("published", rates, seconds=100, batch_size=64)
    assert published == dict.fromkeys(rates, WarmupCosine(1992, 1500))


@pytest.mark.slow
def test_command_measures_both_sides(
    published_store: Path, data_dir: Path, teacher_path: Path, tmp_path: Path
):
    output = tmp_path / "figures.json"
    flags = [
        "--allow_recipe_mismatch",
        "--rounds=2",
        "--seconds=3",
        "--schedule=fitted",
        f"--output={output}",
    ]
    done = subprocess.run(
        [sys.executable, BENCHMARK, *arguments(published_store, data_dir, teacher_path, *flags)],
        cwd=runs.ROOT,
        env={**runs.environment(), "PYTHONPATH": str(runs.ROOT)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads(output.read_text())
    rates = {name: len(rounds) for name, rounds in figures["images_per_second"].items()}
    assert rates == {"example": 2, "offline": 2}
    example, offline = (figures["trained"][name] for name in ("example", "offline"))
    for side in (example, offline):
        assert 0 < side["steps"] <= side["schedule"]["total_steps"]
        assert side["evaluation"]["examples"] == len(stores.TEST_IMAGES)
    # 17 images in batches of 5: the example's fourth batch has two images, while the replay's batches are always whole.
    whole, rest = divmod(example["steps"], 4)
    assert example["teacher_forward_passes"] == 17 * whole + 5 * rest
    assert offline["epochs"] * 17 == pytest.approx(5 * offline["steps"])
    assert offline["teacher_forward_passes"] == 0
