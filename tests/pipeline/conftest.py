"""Flags of a precompute, and teachers that fail in the middle of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from tests.stores import Asked, PlainTeacher, save_teacher


@pytest.fixture
def asked(data_dir: Path, teacher_path: Path, tmp_path: Path) -> Asked:
    """Flags of the published store, for a new store."""
    return Asked(data_dir, teacher_path, tmp_path / "new")


def save_breaking_teacher(path: Path, calls: int) -> Path:
    """Saves a teacher whose logits are NaN after `calls` calls in a process."""
    module = PlainTeacher()
    module.calls = count = tf.Variable(0)

    def call(image: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"logits": tf.where(count.assign_add(1) > calls, np.nan, module(image))}

    return save_teacher(path, call, module=module)


@pytest.fixture(scope="session")
def breaking_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fails in the middle of the shards in the command's process, which tries it with 14 calls; read only."""
    return save_breaking_teacher(tmp_path_factory.mktemp("breaking") / "teacher", 20)


@pytest.fixture(scope="session")
def breaking_worker_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fails in the last of the 15 batches of a worker process, which does not try it; read only."""
    return save_breaking_teacher(tmp_path_factory.mktemp("breaking_worker") / "teacher", 14)
