"""What a precompute is asked for, and a teacher that breaks in the middle of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from tests.stores import Asked, PlainTeacher, save_teacher


@pytest.fixture
def asked(data_dir: Path, teacher_path: Path, tmp_path: Path) -> Asked:
    """The flags of the published store, with a store of their own."""
    return Asked(data_dir, teacher_path, tmp_path / "new")


def save_breaking_teacher(path: Path, calls: int) -> Path:
    """A SavedModel whose logits are not finite after so many calls in a process."""
    module = PlainTeacher()
    module.calls = count = tf.Variable(0)

    def call(image: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"logits": tf.where(count.assign_add(1) > calls, np.nan, module(image))}

    return save_teacher(path, call, module=module)


@pytest.fixture(scope="session")
def breaking_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Breaks in the middle of the shards, in the command's process, which calls it 14 times to try it; read only."""
    return save_breaking_teacher(tmp_path_factory.mktemp("breaking") / "teacher", 20)


@pytest.fixture(scope="session")
def breaking_worker_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Breaks in the last of the 15 batches of a worker process, which does not try it; read only."""
    return save_breaking_teacher(tmp_path_factory.mktemp("breaking_worker") / "teacher", 14)
