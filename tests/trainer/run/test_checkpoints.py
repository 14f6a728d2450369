"""trainer.run.checkpoints: restored state is bit-equal, and checkpoints of other runs are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import DataError, UserError
from tests.mutations import FAST, dumps, mutations
from tests.runs import assert_same_weights
from trainer.config.recipes import TrainRecipe
from trainer.run.checkpoints import Checkpoints, _RunState, read_run
from trainer.step.optimizers import recipe_optimizer
from trainer.step.schedules import WarmupConstant

IDENTITY = {"spec": "a" * 64, "batch_size": 4, "student": "dense"}


class Training:
    """A dense layer with AdamW, and its checkpoints."""

    def __init__(self, directory: Path, *, units: int = 3, keep: int = 3, **identity: Any) -> None:
        tf.keras.utils.set_random_seed(0)
        self.student = tf.keras.Sequential([tf.keras.layers.Dense(units, input_shape=(4,))])
        self.optimizer = recipe_optimizer(
            TrainRecipe(learning_rate=0.1, weight_decay=0.01, clip="none"), WarmupConstant(0)
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


def test_weights_moments_and_step_are_restored_bit_equal(tmp_path: Path):
    before = trained(tmp_path)
    after = Training(tmp_path)
    assert after.checkpoints.restore() == 2
    assert len(after.numbers()) == 2 + 1 + 4  # kernel and bias, iterations, two moments of each
    assert_same_weights(after.numbers(), before.numbers())
    for training in (before, after):
        training.step(2)
    assert_same_weights(after.numbers(), before.numbers())


def test_latest_step_is_read_without_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    training = Training(tmp_path)
    assert training.checkpoints.latest_step() == 0
    trained(tmp_path)
    monkeypatch.delattr(tf.train.Checkpoint, "restore")
    assert training.checkpoints.latest_step() == 2
    with pytest.raises(UserError, match="batch_size"):
        Training(tmp_path, batch_size=8).checkpoints.latest_step()


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
    training.checkpoints.save_best(5, {})
    training.checkpoints.save_best(6, {})
    assert sorted(path.name for path in tmp_path.glob("*.index")) == ["ckpt-4.index", "ckpt-5.index"]
    assert [path.name for path in (tmp_path / "best").glob("*.index")] == ["ckpt-6.index"]


def test_run_does_not_continue_from_the_best(tmp_path: Path):
    training = trained(tmp_path)
    training.checkpoints.save_best(1, {})
    assert Training(tmp_path).checkpoints.restore() == 2


def test_best_is_restored_with_its_evaluation_and_without_the_optimizer(tmp_path: Path):
    training = trained(tmp_path)
    assert training.checkpoints.best() is None
    training.checkpoints.save_best(2, {"split": "test", "student_top1": 0.5})
    best = training.student.get_weights()
    training.step(2)
    training.checkpoints.save(3)
    after = Training(tmp_path)
    assert after.checkpoints.restore() == 3
    optimizer = after.optimizer.get_weights()
    assert after.checkpoints.best() == (2, {"split": "test", "student_top1": 0.5})
    assert (after.student.get_weights()[0] != best[0]).any()
    after.checkpoints.restore_best(after.student)
    assert_same_weights(after.student.get_weights(), best)
    assert_same_weights(after.optimizer.get_weights(), optimizer)


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


def test_half_written_checkpoint_is_ignored(tmp_path: Path):
    before = trained(tmp_path)
    numbers = before.numbers()
    # A crash leaves data without an index or an entry in `checkpoint`.
    (tmp_path / "ckpt-3.data-00000-of-00001").write_bytes(b"half")
    after = Training(tmp_path)
    assert after.checkpoints.restore() == 2
    assert_same_weights(after.numbers(), numbers)
    after.step(2)
    after.checkpoints.save(3)
    assert Training(tmp_path).checkpoints.restore() == 3


def test_only_leftovers_of_a_kill_are_removed(tmp_path: Path):
    trained(tmp_path).checkpoints.save_best(2, {})
    before = sorted(path for path in tmp_path.rglob("*"))
    for directory in (tmp_path, tmp_path / "best"):
        (directory / "ckpt-3.data-00000-of-00001").write_bytes(b"half")
        (directory / "ckpt-3_temp").mkdir()
        (directory / "ckpt-3_temp" / "part-00000-of-00001.data-00000-of-00001.tempstate1").write_bytes(
            b"half"
        )
    after = Training(tmp_path)
    assert after.checkpoints.restore() == 2
    after.checkpoints.remove_leftovers()
    assert sorted(path for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("state", [b"", bytes(80), b"garbage", b"\xff\xfe", b'model_checkpoint_path: ""'])
@pytest.mark.parametrize("where", [".", "best"])
def test_damaged_note_of_the_latest_checkpoint_is_refused(tmp_path: Path, state: bytes, where: str):
    """Even with a single checkpoint, as in `best`."""
    trained(tmp_path, steps=1).checkpoints.save_best(1, {})
    (tmp_path / where / "checkpoint").write_bytes(state)
    with pytest.raises(DataError) as error:
        Training(tmp_path)
    assert str(tmp_path / where / "checkpoint") in str(error.value)


def test_several_checkpoints_without_the_note_of_the_latest_are_refused(tmp_path: Path):
    trained(tmp_path)
    (tmp_path / "checkpoint").unlink()
    with pytest.raises(DataError) as error:
        Training(tmp_path)
    for name in (str(tmp_path / "checkpoint"), "ckpt-1", "ckpt-2"):
        assert name in str(error.value)


def test_damaged_weights_of_the_best_checkpoint_are_refused(tmp_path: Path):
    training = trained(tmp_path)
    training.checkpoints.save_best(2, {})
    (tmp_path / "best" / "ckpt-2.data-00000-of-00001").write_bytes(b"")
    with pytest.raises(DataError) as error:
        training.checkpoints.restore_best(training.student)
    assert str(tmp_path / "best") in str(error.value)


def test_first_checkpoint_without_a_note_is_repeated(tmp_path: Path):
    trained(tmp_path, steps=1)
    (tmp_path / "checkpoint").unlink()
    training = Training(tmp_path)
    assert training.checkpoints.restore() == 0
    training.step(0)
    training.checkpoints.save(1)
    assert Training(tmp_path).checkpoints.restore() == 1


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


RUN = {"step": 3, "spec": "d", "evaluation": {"split": "test", "student_top1": 0.5, "agreement": 0.5}}


@FAST
@given(st.data())
def test_any_state_in_a_checkpoint_is_refused_or_read(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    state = _RunState({})
    state.serialize = lambda: dumps(data.draw(mutations({"run": RUN}))["run"]).decode()  # type: ignore[method-assign]
    path = tf.train.Checkpoint(run=state).write(str(tmp_path_factory.getbasetemp() / "any"))
    try:
        found = read_run(path)
    except DataError:
        return
    assert type(found["step"]) is int
    assert isinstance(found.get("evaluation", {}), dict)
