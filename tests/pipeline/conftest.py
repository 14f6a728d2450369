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


@pytest.fixture(scope="session")
def breaking_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SavedModel whose logits are not finite from its 15th call in a process on; read only."""
    module = PlainTeacher()
    module.calls = calls = tf.Variable(0)

    def call(image: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"logits": tf.where(calls.assign_add(1) > 14, np.nan, module(image))}

    return save_teacher(tmp_path_factory.mktemp("breaking") / "teacher", call, module=module)
