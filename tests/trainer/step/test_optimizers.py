"""trainer.step.optimizers, compared with Keras's AdamW and with NumPy."""

from __future__ import annotations

import dataclasses
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from trainer.config.recipes import TrainRecipe
from trainer.step.optimizers import ADAMW, KerasAdamW, recipe_optimizer
from trainer.step.schedules import Multiplier, Scaled, WarmupConstant, WarmupCosine

STEPS = 100
SHAPES = {
    "dense/kernel": (5, 4),
    "dense/bias": (4,),
    "conv/depthwise_kernel": (3, 3, 2, 1),
    "norm/gamma": (4,),
}
DECAYED = [True, False, True, False]  # which of SHAPES are kernels


def initial_weights() -> list[np.ndarray]:
    generator = np.random.default_rng(1)
    return [generator.normal(size=shape).astype(np.float32) for shape in SHAPES.values()]


def gradients(step: int) -> list[np.ndarray]:
    """Gradients with norms from 0.3 to 3, so that only some are clipped at 1."""
    generator = np.random.default_rng(100 + step)
    scale = 0.3 * 10 ** generator.random()
    return [
        (scale * generator.normal(size=s) / np.sqrt(np.prod(s))).astype(np.float32) for s in SHAPES.values()
    ]


def variables() -> list[tf.Variable]:
    names_and_values = zip(SHAPES, initial_weights(), strict=True)
    return [tf.Variable(value, name=name) for name, value in names_and_values]


def train(optimizer: Any, weights: list[tf.Variable], steps: range) -> list[np.ndarray]:
    @tf.function
    def apply(grads: list[tf.Tensor]) -> None:
        optimizer.apply_gradients(zip(grads, weights, strict=True))

    for step in steps:
        apply([tf.constant(g) for g in gradients(step)])
    return [w.numpy() for w in weights]


def make(
    *,
    schedule: Multiplier = WarmupCosine(STEPS, 10),  # noqa: B008
    adamw: type[Any] = ADAMW,
    **changes: Any,
) -> Any:
    recipe = TrainRecipe(learning_rate=0.01, weight_decay=0.02, epsilon=1e-7)
    return recipe_optimizer(dataclasses.replace(recipe, **changes), schedule, adamw=adamw)


def reference(
    decay: Callable[[int], float], *, clip: str, kernels_only: bool, rate: Callable[[int], float]
) -> list[np.ndarray]:
    """AdamW in float64: decay, then Adam with "epsilon hat" and the paper's bias correction."""
    b1, b2, epsilon = 0.9, 0.999, 1e-7
    weights = [w.astype(np.float64) for w in initial_weights()]
    first = [np.zeros_like(w) for w in weights]
    second = [np.zeros_like(w) for w in weights]
    for step in range(STEPS):
        grads = [g.astype(np.float64) for g in gradients(step)]
        total = np.sqrt(sum(np.sum(g**2) for g in grads))
        alpha = rate(step) * np.sqrt(1 - b2 ** (step + 1)) / (1 - b1 ** (step + 1))
        for i, gradient in enumerate(grads):
            g = gradient
            if clip != "none":
                g = g / max(1.0, total if clip == "global" else np.sqrt(np.sum(g**2)))
            if DECAYED[i] or not kernels_only:
                weights[i] -= decay(step) * weights[i]
            first[i] = b1 * first[i] + (1 - b1) * g
            second[i] = b2 * second[i] + (1 - b2) * g**2
            weights[i] -= alpha * first[i] / (np.sqrt(second[i]) + epsilon)
    return weights


def multiplier(step: int) -> float:
    """A schedule that is independent of trainer.step.schedules."""
    return min(1, step / 10) * 0.5 * (1 + np.cos(np.pi * max(0, step - 10) / (STEPS - 10)))


@pytest.mark.parametrize("kernels_only", [True, False])
@pytest.mark.parametrize("decay_mode", ["scaled", "unscaled"])
@pytest.mark.parametrize("clip", ["none", "per_variable", "global"])
def test_equals_numpy_reference(clip: str, decay_mode: str, kernels_only: bool) -> None:
    optimizer = make(clip=clip, decay_mode=decay_mode, decay_kernels_only=kernels_only)
    actual = train(optimizer, variables(), range(STEPS))
    expected = reference(
        lambda step: 0.02 * (multiplier(step) if decay_mode == "scaled" else 1),
        clip=clip,
        kernels_only=kernels_only,
        rate=lambda step: 0.01 * multiplier(step),
    )
    assert optimizer.iterations.numpy() == STEPS
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=2e-5, atol=2e-6)


def test_equals_keras_adamw() -> None:
    """Keras decays by `lr * wd * w`, TFA by `wd * w`; both before Adam's step, both float32.

    With TFA's wd = Keras's wd * lr they differ in rounding alone (the order of Adam's multiplications): 1e-5
    relative, 1e-6 absolute after 100 steps.
    """
    ours = make(
        schedule=WarmupConstant(0),
        weight_decay=0.01 * 0.5,
        decay_mode="unscaled",
        decay_kernels_only=False,
        clip="none",
    )
    keras = tf.keras.optimizers.AdamW(learning_rate=0.01, weight_decay=0.5, epsilon=1e-7)
    weights = variables()
    keras.build(weights)
    for a, e in zip(train(ours, variables(), range(STEPS)), train(keras, weights, range(STEPS)), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6)


def test_equals_keras_adamw_under_a_schedule() -> None:
    """Scaled decay of `lr * wd` is Keras's `lr * wd` with the same schedule on its learning rate."""
    ours = make(weight_decay=0.01 * 0.5, decay_kernels_only=False, clip="none")
    keras = tf.keras.optimizers.AdamW(Scaled(0.01, WarmupCosine(STEPS, 10)), weight_decay=0.5, epsilon=1e-7)
    weights = variables()
    keras.build(weights)
    for a, e in zip(train(ours, variables(), range(STEPS)), train(keras, weights, range(STEPS)), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6)


def test_kernels_only() -> None:
    weights = variables()
    zeros = [tf.zeros_like(w) for w in weights]
    optimizer = make(schedule=WarmupConstant(0), weight_decay=0.25, clip="none")
    optimizer.apply_gradients(zip(zeros, weights, strict=True))
    for before, after, decayed in zip(initial_weights(), weights, DECAYED, strict=True):
        np.testing.assert_allclose(after, before * (0.75 if decayed else 1), rtol=1e-6)


def test_kernels_of_keras_layers_are_recognized() -> None:
    model = tf.keras.Sequential(
        [
            tf.keras.layers.SeparableConv2D(4, 3, input_shape=(8, 8, 3)),
            tf.keras.layers.GroupNormalization(2),
            tf.keras.layers.Dense(2),
        ]
    )
    for variable in model.trainable_variables:
        variable.assign(tf.ones_like(variable))
    optimizer = make(schedule=WarmupConstant(0), weight_decay=0.5, clip="none")
    optimizer.apply_gradients([(tf.zeros_like(v), v) for v in model.trainable_variables])
    for variable in model.trainable_variables:
        np.testing.assert_array_equal(variable, 0.5 if variable.shape.rank > 1 else 1.0)


@pytest.mark.parametrize("decay_mode", ["scaled", "unscaled"])
def test_checkpoint_in_the_middle_is_bit_equal(tmp_path: pathlib.Path, decay_mode: str) -> None:
    undisturbed = train(make(decay_mode=decay_mode), variables(), range(20))

    weights, optimizer = variables(), make(decay_mode=decay_mode)
    train(optimizer, weights, range(11))
    path = tf.train.Checkpoint(weights=weights, optimizer=optimizer).write(str(tmp_path / "checkpoint"))

    weights, optimizer = variables(), make(decay_mode=decay_mode)
    status = tf.train.Checkpoint(weights=weights, optimizer=optimizer).read(path)
    assert optimizer.iterations.numpy() == 11
    resumed = train(optimizer, weights, range(11, 20))
    status.assert_consumed()
    for a, b in zip(undisturbed, resumed, strict=True):
        np.testing.assert_array_equal(a, b)


def test_rates_come_from_the_arguments_and_not_from_a_checkpoint(tmp_path: pathlib.Path) -> None:
    weights, optimizer = variables(), make(weight_decay=0.5, decay_mode="unscaled")
    train(optimizer, weights, range(1))
    path = tf.train.Checkpoint(optimizer=optimizer).write(str(tmp_path / "checkpoint"))
    weights = variables()
    other = make(weight_decay=0.0, learning_rate=0.0, decay_mode="unscaled")
    tf.train.Checkpoint(optimizer=other).read(path)
    for before, after in zip(initial_weights(), train(other, weights, range(1, 2)), strict=True):
        np.testing.assert_array_equal(before, after)


def test_importing_gives_no_warning() -> None:
    subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", "import trainer.step.optimizers"], check=True
    )


BOTH = pytest.mark.skipif(
    ADAMW is KerasAdamW, reason="TensorFlow Addons, which the other AdamW is from, is not installed"
)


@BOTH
@pytest.mark.parametrize("kernels_only", [True, False])
@pytest.mark.parametrize("decay_mode", ["scaled", "unscaled"])
@pytest.mark.parametrize("clip", ["none", "per_variable", "global"])
def test_addons_and_keras_are_bit_equal(clip: str, decay_mode: str, kernels_only: bool) -> None:
    arguments = {"clip": clip, "decay_mode": decay_mode, "decay_kernels_only": kernels_only}
    theirs, ours = (
        train(make(adamw=adamw, **arguments), variables(), range(STEPS)) for adamw in (ADAMW, KerasAdamW)
    )
    for a, b in zip(theirs, ours, strict=True):
        np.testing.assert_array_equal(a, b)


@BOTH
def test_addons_and_keras_are_bit_equal_for_rows_of_an_embedding() -> None:
    results = []
    for adamw in (ADAMW, KerasAdamW):
        table = tf.Variable(np.arange(12, dtype=np.float32).reshape(4, 3), name="table/kernel")
        optimizer = make(adamw=adamw, clip="none")
        for step in range(3):
            rows = tf.IndexedSlices(tf.ones([2, 3]), tf.constant([step, 3]), tf.constant([4, 3]))
            optimizer.apply_gradients([(rows, table)])
        results.append(table.numpy())
    np.testing.assert_array_equal(*results)


@BOTH
@pytest.mark.parametrize("first", ["addons", "keras"])
def test_a_run_continues_with_the_other_adamw(tmp_path: pathlib.Path, first: str) -> None:
    order = (ADAMW, KerasAdamW) if first == "addons" else (KerasAdamW, ADAMW)
    undisturbed = train(make(), variables(), range(20))
    weights, optimizer = variables(), make(adamw=order[0])
    train(optimizer, weights, range(11))
    path = tf.train.Checkpoint(weights=weights, optimizer=optimizer).write(str(tmp_path / "checkpoint"))
    weights, optimizer = variables(), make(adamw=order[1])
    status = tf.train.Checkpoint(weights=weights, optimizer=optimizer).read(path)
    resumed = train(optimizer, weights, range(11, 20))
    status.assert_consumed()
    for a, b in zip(undisturbed, resumed, strict=True):
        np.testing.assert_array_equal(a, b)
