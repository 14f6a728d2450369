"""trainer.step.loss: the loss against NumPy and golden values, and as a Keras loss."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from pipeline.errors import UserError
from trainer.models import build_student
from trainer.step.distiller import Distiller
from trainer.step.loss import DistillationLoss


def numpy_loss(teacher: np.ndarray, student: np.ndarray, temperature: float) -> np.ndarray:
    def softmax(x: np.ndarray) -> np.ndarray:
        e = np.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    p = softmax(teacher.astype(np.float64) / temperature)
    q = softmax(student.astype(np.float64) / temperature)
    return (p * np.log(p / q)).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 10.0])
def test_loss_against_numpy(temperature: float) -> None:
    generator = np.random.default_rng(0)
    teacher, student = generator.normal(0, 4, (2, 16, 102)).astype(np.float32)
    expected = numpy_loss(teacher, student, temperature)
    plain = DistillationLoss(temperature)
    losses = plain.call(teacher, student)
    assert (losses.shape, losses.dtype) == ((16,), tf.float32)
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(plain(teacher, student), expected.mean(), rtol=1e-5)
    squared = DistillationLoss(temperature, temperature_squared=True).call(teacher, student)
    np.testing.assert_allclose(squared, expected * temperature**2, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("temperature", "golden"),
    [(1, [1.15042077, 0.71049656]), (2, [0.32015667, 0.53130915]), (10, [0.01331116, 0.04463633])],
)
def test_golden_values(temperature: float, golden: list[float]) -> None:
    """They change only with the published formula."""
    teacher, student = [[1.0, 2, 3], [0, -4, 4]], [[3.0, 2, 1], [0, 0, 0.5]]
    np.testing.assert_allclose(DistillationLoss(temperature).call(teacher, student), golden, rtol=1e-5)


def test_loss_is_stable_at_large_logits_and_zero_at_equality() -> None:
    logits = tf.constant([[1000.0, -1000.0, 0.0], [3.0, 2.0, 1.0]])
    loss = DistillationLoss(1.0, temperature_squared=True)
    np.testing.assert_array_equal(loss.call(logits, logits), [0, 0])
    np.testing.assert_allclose(loss.call(logits, -logits)[0], 2000, rtol=1e-6)


def test_loss_is_float32_for_narrow_logits() -> None:
    logits = tf.random.stateless_normal([8, 10], [1, 2], dtype=tf.bfloat16)
    assert DistillationLoss(1.0).call(logits, tf.zeros_like(logits)).dtype == tf.float32


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_temperature_is_refused(temperature: float) -> None:
    with pytest.raises(UserError, match=re.escape(f"`temperature`={temperature}")):
        DistillationLoss(temperature)
    with pytest.raises(UserError, match=re.escape(f"`temperature`={temperature}")):
        Distiller(build_student("tiny", num_classes=3, image_size=32), temperature=temperature)


def test_compiled_student_is_saved_and_loaded_with_its_loss(tmp_path: Path) -> None:
    student = build_student("tiny", num_classes=3, image_size=32)
    student.compile("sgd", loss=DistillationLoss(4.0, temperature_squared=True))
    student.save(tmp_path / "student.keras")
    loss = tf.keras.models.load_model(tmp_path / "student.keras", safe_mode=False).loss
    assert loss.get_config() == student.loss.get_config()
    assert (loss.temperature, loss.temperature_squared) == (4.0, True)
