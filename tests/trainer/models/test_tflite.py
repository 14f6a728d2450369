"""Exported students convert to TFLite, and the converted student has the logits of the SavedModel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from tests.images import pictures
from trainer.models import build_student
from trainer.run.results import export_student

QUICK = ("tiny", "small")
SLOW = (
    "resnet50v2",
    "bit_r50x1",
)  # one BiT is enough: all are built by the same code, and some exceed TFLite's 2 GB


def converted_logits(path: Path, image: np.ndarray) -> np.ndarray:
    """Converts a SavedModel to TFLite; its logits for one image float32 [1, S, S, 3]."""
    interpreter = tf.lite.Interpreter(
        model_content=tf.lite.TFLiteConverter.from_saved_model(str(path)).convert()
    )
    (given,), (found,) = interpreter.get_input_details(), interpreter.get_output_details()
    interpreter.allocate_tensors()
    interpreter.set_tensor(given["index"], image)
    interpreter.invoke()
    logits: np.ndarray = interpreter.get_tensor(found["index"])
    return logits


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_converted_student_agrees_with_its_saved_model(name: str, tmp_path: Path) -> None:
    tf.keras.utils.set_random_seed(3)
    size = 32
    student = build_student(name, num_classes=5, image_size=size)
    if name.startswith("bit"):  # whose head is initialized to zero
        head = student.layers[-1]
        head.set_weights(
            [np.random.default_rng(0).normal(size=w.shape, scale=0.03) for w in head.get_weights()]
        )
    export_student(student, tmp_path / "student")
    del student
    image = np.asarray(pictures(1, size))
    (expected,) = (
        tf.saved_model.load(str(tmp_path / "student")).signatures["serving_default"](image=image).values()
    )
    assert np.ptp(expected) > 0.01
    np.testing.assert_allclose(converted_logits(tmp_path / "student", image), expected, rtol=0, atol=1e-4)
