"""Out of memory: a real failed allocation gives one line that names the flag."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tensorflow as tf

from pipeline.errors import EXIT_USER_ERROR
from pipeline.inputs.device_memory import is_out_of_memory
from pipeline.inputs.teacher import Teacher
from pipeline.views.input import ViewInput
from tests import stores
from tests.runs import arguments, fail
from tests.teachers import finetune_arguments
from trainer import models, teacher
from trainer.config import choices


def too_much(x: tf.Tensor) -> tf.Tensor:
    """Computes [B, 1] with 35 TB per row; 4 rows exceed the address space of a process."""
    huge = tf.broadcast_to(x[:, :1, :1, :1], [tf.shape(x)[0], 2**21, 2**22, 1])
    return tf.reduce_max(huge, axis=[1, 2])


class Greedy(tf.keras.layers.Layer):
    """Allocates too much memory in training or in inference."""

    def __init__(self, *, training: bool) -> None:
        super().__init__()
        self._when = training

    def call(self, inputs: list[tf.Tensor], training: bool | None = None) -> tf.Tensor:
        logits, image = inputs
        return logits + too_much(image) if bool(training) == self._when else logits


@pytest.fixture
def greedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(num_classes: int, image_size: int, *, training: bool) -> tf.keras.Model:
        image = tf.keras.Input((image_size, image_size, 3))
        logits = tf.keras.layers.Dense(num_classes)(tf.keras.layers.GlobalAveragePooling2D()(image))
        return tf.keras.Model(image, Greedy(training=training)([logits, image]), name="greedy")

    for name, training in (("greedy", True), ("greedy_in_evaluation", False)):
        monkeypatch.setitem(
            models.STUDENTS, name, lambda c, s, training=training: build(c, s, training=training)
        )
    monkeypatch.setattr(choices, "STUDENTS", tuple(models.STUDENTS))


def test_step_out_of_memory_names_the_batch_size_without_rendering_again(
    greedy: None,
    three_epochs: Path,
    data_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    def batches(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("batches are rendered again")

    monkeypatch.setattr(ViewInput, "batches", batches)
    argv = arguments(three_epochs, tmp_path, data_dir, "--student=greedy", "--steps_per_execution=2")
    code, message = fail(argv, capsys)
    assert code == EXIT_USER_ERROR
    for words in (
        "out of memory",
        "--batch_size (5 ",
        "--steps_per_execution (2)",
        "CPU:0",
        "[5,2097152,4194304,1]",
    ):
        assert words in message


@pytest.mark.slow
def test_evaluation_out_of_memory_names_its_batch_size(
    greedy: None, published_store: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    flags = ("--student=greedy_in_evaluation", "--steps=1", "--eval_batch_size=6")
    code, message = fail(arguments(published_store, tmp_path, data_dir, *flags), capsys)
    assert code == EXIT_USER_ERROR
    assert "--eval_batch_size (6 " in message


@pytest.mark.slow
def test_fine_tuning_out_of_memory_names_the_batch_size(
    greedy: None, colors_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    argv = finetune_arguments(colors_dir, tmp_path, network="--model=greedy")
    code, message = fail(argv, capsys, main=teacher.main)
    assert code == EXIT_USER_ERROR
    assert "--batch_size (10 " in message


def test_online_teacher_out_of_memory_names_the_store_s_batch_size(
    one_epoch: Path,
    data_dir: Path,
    teacher_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(Teacher, "__call__", lambda self, views: too_much(views) + tf.zeros([stores.CLASSES]))
    argv = arguments(one_epoch, tmp_path, data_dir, f"--teacher={teacher_path}", "--epochs=2")
    code, message = fail(argv, capsys)
    assert code == EXIT_USER_ERROR
    assert "--teacher_batch_size" in message


def test_full_disk_is_not_reported_as_out_of_memory():
    full = tf.errors.ResourceExhaustedError(None, None, "the/path; No space left on device")
    assert not is_out_of_memory(full)
    assert is_out_of_memory(tf.errors.ResourceExhaustedError(None, None, "OOM when allocating"))
    assert is_out_of_memory(tf.errors.InternalError(None, None, "CUDNN_STATUS_ALLOC_FAILED"))
    assert not is_out_of_memory(tf.errors.InternalError(None, None, "something else"))
