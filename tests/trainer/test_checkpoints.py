"""trainer.checkpoints: what is saved comes back bit for bit, and only into the run that it is of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from pipeline.errors import DataError, UserError
from tests.runs import assert_same_weights
from trainer.checkpoints import Checkpoints
from trainer.optimizers import make_optimizer
from trainer.schedules import WarmupConstant

IDENTITY = {"spec": "a" * 64, "batch_size": 4, "student": "dense"}


class Training:
    """A dense layer with AdamW, and its checkpoints."""

    def __init__(self, directory: Path, *, units: int = 3, keep: int = 3, **identity: Any) -> None:
        tf.keras.utils.set_random_seed(0)
        self.student = tf.keras.Sequential([tf.keras.layers.Dense(units, input_shape=(4,))])
        self.optimizer = make_optimizer(
            0.1,
            schedule=WarmupConstant(0),
            weight_decay=0.01,
            decay_mode="scaled",
            decay_kernels_only=True,
            clip="none",
            clip_norm=1.0,
        )
        self.checkpoints = Checkpoints(
            directory,
            student=self.student,
            optimizer=self.optimizer,
            identity={**IDENTITY, **identity},
            keep=keep,
        )

    def step(self, seed: int) -> None:
        images = tf.random.stateless_normal([8, 4], [seed, 0])
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(self.student(images) ** 2)
        variables = self.student.trainable_variables
        self.optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))

    def numbers(self) -> list[np.ndarray]:
        """Weights, moments and the step counter."""
        return [*self.student.get_weights(), *self.optimizer.get_weights()]


def trained(directory: Path, *, steps: int = 2, **arguments: Any) -> Training:
    training = Training(directory, **arguments)
    for step in range(steps):
        training.step(step)
        training.checkpoints.save(step + 1)
    return training


def test_weights_moments_and_step_come_back_bit_for_bit(tmp_path: Path):
    before = trained(tmp_path)
    after = Training(tmp_path)
    assert after.checkpoints.restore() == 2
    assert len(after.numbers()) == 2 + 1 + 4  # kernel and bias, iterations, two moments of each
    assert_same_weights(after.numbers(), before.numbers())
    for training in (before, after):
        training.step(2)
    assert_same_weights(after.numbers(), before.numbers())


def test_empty_directory_starts_from_the_beginning(tmp_path: Path):
    training = Training(tmp_path)
    weights = training.student.get_weights()
    assert training.checkpoints.restore() == 0
    assert_same_weights(training.student.get_weights(), weights)


def test_checkpoint_of_another_store_is_refused_with_both_digests(tmp_path: Path):
    trained(tmp_path)
    with pytest.raises(DataError) as error:
        Training(tmp_path, spec="b" * 64).checkpoints.restore()
    message = str(error.value)
    assert f"spec: {'b' * 64} asked for, {'a' * 64} in the checkpoint" in message
    assert "--workdir" in message


def test_checkpoint_of_other_flags_is_refused_with_both_values(tmp_path: Path):
    trained(tmp_path)
    other = Training(tmp_path, batch_size=8, extra=True)
    weights = other.student.get_weights()
    with pytest.raises(UserError) as error:
        other.checkpoints.restore()
    message = str(error.value)
    assert "batch_size: 8 asked for, 4 in the checkpoint" in message
    assert "extra: True asked for, absent in the checkpoint" in message
    assert "student" not in message
    assert_same_weights(other.student.get_weights(), weights)


def test_latest_few_and_the_best_are_kept(tmp_path: Path):
    training = trained(tmp_path, steps=5, keep=2)
    training.checkpoints.save_best(5)
    training.checkpoints.save_best(6)
    assert sorted(path.name for path in tmp_path.glob("*.index")) == ["ckpt-4.index", "ckpt-5.index"]
    assert [path.name for path in (tmp_path / "best").glob("*.index")] == ["ckpt-6.index"]


def test_best_is_not_what_a_run_goes_on_from(tmp_path: Path):
    training = trained(tmp_path)
    training.checkpoints.save_best(1)
    assert Training(tmp_path).checkpoints.restore() == 2


def test_saving_a_step_twice_writes_once(tmp_path: Path):
    training = trained(tmp_path)
    (index,) = tmp_path.glob("ckpt-2.index")
    before = index.stat().st_mtime_ns
    training.checkpoints.save(2)
    assert index.stat().st_mtime_ns == before


def test_step_twelve_is_not_taken_for_step_two(tmp_path: Path):
    training = trained(tmp_path, steps=1)
    training.checkpoints.save(12)
    training.checkpoints.save(2)
    assert Training(tmp_path).checkpoints.restore() == 2


def test_half_written_checkpoint_is_passed_over(tmp_path: Path):
    before = trained(tmp_path)
    numbers = before.numbers()
    # What a crash leaves: data without index, and no mention in `checkpoint`.
    (tmp_path / "ckpt-3.data-00000-of-00001").write_bytes(b"half")
    after = Training(tmp_path)
    assert after.checkpoints.restore() == 2
    assert_same_weights(after.numbers(), numbers)
    after.step(2)
    after.checkpoints.save(3)
    assert Training(tmp_path).checkpoints.restore() == 3


@pytest.mark.parametrize("what", ["truncated", "one_bit", "no_index", "garbage_index"])
def test_damaged_checkpoint_is_refused_and_named(tmp_path: Path, what: str):
    training = trained(tmp_path)
    data, index = tmp_path / "ckpt-2.data-00000-of-00001", tmp_path / "ckpt-2.index"
    content = data.read_bytes()
    if what == "truncated":
        data.write_bytes(content[: len(content) // 2])
    elif what == "one_bit":
        kernel = training.student.get_weights()[0].tobytes()
        position = content.index(kernel) + 5
        data.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
    elif what == "no_index":
        index.unlink()
    else:
        index.write_bytes(b"garbage")
    with pytest.raises(DataError, match=r"ckpt-2"):
        Training(tmp_path).checkpoints.restore()


def test_checkpoint_of_another_network_is_refused(tmp_path: Path):
    trained(tmp_path)
    with pytest.raises(DataError, match=r"ckpt-2"):
        Training(tmp_path, units=5).checkpoints.restore()
