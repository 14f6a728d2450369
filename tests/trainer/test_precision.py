"""`--precision=bfloat16`: learns like float32, exports a float32 interface, and is not mixed with float32 runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from pipeline.errors import EXIT_USER_ERROR
from tests import stores
from tests.runs import arguments, checkpoint_weights, fail, losses, start_run
from trainer.run.results import export_student
from trainer.run.training import Run

# Relative tolerance of losses: rounding to bfloat16 is 2^-9 of a number, and differences in the weights grow.
TOLERANCE = 0.02


@pytest.fixture(scope="module")
def runs(published_store: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """The same ten steps in both precisions."""
    out = {}
    for precision in ("float32", "bfloat16"):
        workdir = tmp_path_factory.mktemp(precision)
        flags = ("--log_every=1", "--eval_every=5", "--learning_rate=0.003", f"--precision={precision}")
        out[precision] = start_run(arguments(published_store, workdir, data_dir, *flags))
        out[precision].train()
    return out


def test_bfloat16_run_learns_like_the_float32_run(runs: dict[str, Run]):
    narrow, wide = (np.array(list(losses(runs[p].workdir).values())) for p in ("bfloat16", "float32"))
    assert len(wide) == 10
    np.testing.assert_allclose(narrow, wide, rtol=TOLERANCE)
    assert np.any(narrow != wide)
    assert wide.max() > 1.2 * wide.min()  # the loss changes by more than the tolerance


def test_weights_and_optimizer_state_are_float32(runs: dict[str, Run]):
    assert {array.dtype.name for array in checkpoint_weights(runs["bfloat16"].workdir).values()} == {
        "float32",
        "int64",  # the optimizer's step
    }


def test_exported_student_has_float32_inputs_and_outputs(runs: dict[str, Run], tmp_path: Path):
    run = runs["bfloat16"]
    served = tf.saved_model.load(str(export_student(run.student, tmp_path / "student"))).signatures[
        "serving_default"
    ]
    assert served.structured_input_signature[1]["image"] == tf.TensorSpec(
        [None, stores.SIZE, stores.SIZE, 3], tf.float32, name="image"
    )
    images = tf.constant(
        np.random.default_rng(0).uniform(0, 255, (6, stores.SIZE, stores.SIZE, 3)), tf.float32
    )
    (logits,) = served(image=images).values()
    assert logits.dtype == tf.float32
    # The exported student computes in bfloat16, as evaluated. A single rounding may differ.
    np.testing.assert_allclose(logits, run.student(images, training=False), rtol=0.01, atol=0.01)


def test_run_is_not_continued_in_another_precision(
    runs: dict[str, Run], published_store: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]
):
    workdir = runs["bfloat16"].workdir
    code, message = fail(arguments(published_store, workdir, data_dir, "--learning_rate=0.003"), capsys)
    assert code == EXIT_USER_ERROR
    assert "precision: float32 asked for, bfloat16 in the checkpoint" in message


def test_unknown_precision_is_refused_before_anything_is_created(
    published_store: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    argv = arguments(published_store, tmp_path / "run", data_dir, "--precision=float64")
    code, message = fail(argv, capsys)
    assert code == EXIT_USER_ERROR
    assert "--precision" in message
    assert "float64" in message
    assert not (tmp_path / "run").exists()


def test_online_steps_of_a_bfloat16_run_keep_the_teacher_in_float32(
    one_epoch: Path, data_dir: Path, teacher_path: Path, tmp_path: Path
):
    argv = arguments(
        one_epoch, tmp_path, data_dir, "--precision=bfloat16", "--steps=5", f"--teacher={teacher_path}"
    )
    run = start_run(argv)
    assert run.teachers is not None
    views = tf.constant(
        np.random.default_rng(0).uniform(0, 255, (5, stores.SIZE, stores.SIZE, 3)), tf.float32
    )
    before = run.teachers(views)
    assert run.train()["teacher_forward_passes"] == 10
    np.testing.assert_array_equal(run.teachers(views), before)
    assert run.distiller._online_logits(views).dtype == tf.float32
    np.testing.assert_array_equal(run.distiller._online_logits(views), before)
