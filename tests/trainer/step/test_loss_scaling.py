"""trainer.step.loss_scaling: skipped steps, the scale, and the updates of the other steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tests.runs import assert_same_weights
from tests.students import MINIMAL
from tests.trainer.step.test_distiller import BATCH, CLASSES, SIZE, make_batch
from trainer.config.recipes import TrainRecipe
from trainer.models import build_student
from trainer.step import loss_scaling
from trainer.step.distiller import Distiller
from trainer.step.loss_scaling import scale_loss
from trainer.step.optimizers import ADAMW, KerasAdamW, recipe_optimizer
from trainer.step.schedules import WarmupConstant, WarmupCosine

OVERFLOWS = 2.0**40  # a scale whose gradients no float16 holds
CLIP_NORM = 0.1
# The class of this environment, and the other one where there are two.
EVERY_ADAMW = pytest.mark.parametrize(
    "adamw", [ADAMW, *(pytest.param(c, marks=pytest.mark.slow) for c in {KerasAdamW} - {ADAMW})]
)


@pytest.fixture
def scaled_by(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a distiller of `minimal` with an initial loss scale; None for a plain optimizer."""

    def make(
        scale: float | None,
        *,
        precision: str = "float16",
        adamw: Any = ADAMW,
        clip: Any = "global",
        growth_steps: int = 2,
    ) -> Distiller:
        tf.keras.utils.set_random_seed(0)
        student = build_student(MINIMAL, num_classes=CLASSES, image_size=SIZE, precision=precision)
        distiller = Distiller(student, temperature=2.0, temperature_squared=True)
        recipe = TrainRecipe(learning_rate=0.01, weight_decay=1e-3, clip=clip, clip_norm=CLIP_NORM)
        optimizer = recipe_optimizer(recipe, WarmupCosine(100, 2), adamw=adamw)
        if scale is not None:
            monkeypatch.setattr(loss_scaling, "INITIAL_SCALE", scale)
            monkeypatch.setattr(loss_scaling, "GROWTH_STEPS", growth_steps)
            optimizer = scale_loss(optimizer)
        optimizer._create_all_weights(student.trainable_variables)
        distiller.compile(optimizer=optimizer)
        return distiller

    return make


def steps(distiller: Distiller, count: int, **options: Any) -> list[dict[str, Any]]:
    step = tf.function(distiller.train_step, **options)
    return [{k: v.numpy().item() for k, v in step(make_batch(seed)).items()} for seed in range(count)]


def state(distiller: Distiller) -> list[np.ndarray]:
    """Weights and moments, without the step."""
    return [*distiller.student.get_weights(), *distiller.optimizer.get_weights()[1:]]


@EVERY_ADAMW
def test_overflow_halves_the_scale_and_leaves_all_but_the_step_unchanged(scaled_by: Any, adamw: Any) -> None:
    distiller = scaled_by(OVERFLOWS, adamw=adamw)
    before = state(distiller)
    figures = steps(distiller, 2)
    assert [(f["loss_scale"], f["skipped_steps"]) for f in figures] == [
        (OVERFLOWS / 2, 1),
        (OVERFLOWS / 4, 2),
    ]
    assert not any(np.isfinite(f["gradient_norm"]) for f in figures)
    assert all(np.isfinite(f["loss"]) for f in figures)
    assert [f["unfit_steps"] for f in figures] == [0, 0]
    assert distiller.optimizer.iterations == 2
    assert_same_weights(state(distiller), before)


@pytest.mark.slow
def test_scale_grows_after_steps_without_overflow(scaled_by: Any) -> None:
    distiller = scaled_by(8.0, growth_steps=3)
    assert [f["loss_scale"] for f in steps(distiller, 7)] == [8, 8, 16, 16, 16, 32, 32]
    assert distiller.skipped is not None
    assert distiller.skipped.total == 0


@EVERY_ADAMW
@pytest.mark.parametrize("clip", ["global", pytest.param("per_variable", marks=pytest.mark.slow)])
def test_scaled_steps_of_float32_are_the_plain_steps(scaled_by: Any, adamw: Any, clip: str) -> None:
    """A power of two does not round, so that decay, moments and clipping of the unscaled gradients are bit-equal."""
    plain = scaled_by(None, precision="float32", adamw=adamw, clip=clip)
    scaled = scaled_by(2.0**10, precision="float32", adamw=adamw, clip=clip)
    expected = steps(plain, 3)
    assert max(figures["gradient_norm"] for figures in expected) > CLIP_NORM
    for got, wanted in zip(steps(scaled, 3), expected, strict=True):
        assert {name: got[name] for name in wanted} == wanted
    assert_same_weights(state(scaled), state(plain))


@pytest.mark.slow
def test_compiled_loop_is_the_plain_steps(scaled_by: Any) -> None:
    """Three steps, of which the first two overflow."""
    plain, looped = scaled_by(2.0**24), scaled_by(2.0**24)
    expected = steps(plain, 3)
    assert [figures["skipped_steps"] for figures in expected] == [1, 2, 2]
    stack = tf.nest.map_structure(lambda *parts: tf.stack(parts), *(make_batch(seed) for seed in range(3)))
    figures = tf.function(looped.train_steps, jit_compile=True)(stack, tf.constant(3, tf.int64))
    for name, value in expected[-1].items():
        np.testing.assert_allclose(figures[name], value, rtol=0.01, err_msg=name)
    assert looped.optimizer.iterations == 3
    assert looped.optimizer.dynamic_counter == plain.optimizer.dynamic_counter


def test_targets_that_are_not_finite_are_counted(scaled_by: Any) -> None:
    distiller = scaled_by(8.0)
    logits = tf.tensor_scatter_nd_update(make_batch()["logits"], [[BATCH - 1, 0]], [float("nan")])
    figures = distiller.train_step(make_batch() | {"logits": logits})
    assert (figures["skipped_steps"], figures["unfit_steps"]) == (1, 1)


def test_state_is_in_the_checkpoint(scaled_by: Any, tmp_path: Any) -> None:
    first, second = scaled_by(OVERFLOWS), scaled_by(8.0)
    steps(first, 2)
    saved, restored = (tf.train.Checkpoint(optimizer=d.optimizer, skipped=d.skipped) for d in (first, second))
    restored.restore(saved.save(str(tmp_path / "state"))).assert_consumed()
    assert second.optimizer.loss_scale == OVERFLOWS / 4
    assert second.skipped.total == 2


@pytest.mark.slow
def test_loss_is_scaled_by_any_optimizer_of_keras() -> None:
    student = build_student(MINIMAL, num_classes=CLASSES, image_size=SIZE, precision="float16")
    distiller = Distiller(student, temperature=2.0)
    optimizer = tf.keras.mixed_precision.LossScaleOptimizer(tf.keras.optimizers.SGD(WarmupConstant(0)))
    distiller.compile(optimizer=optimizer)
    assert distiller.train_step(make_batch())["skipped_steps"] == 0
    assert optimizer.iterations == 1
