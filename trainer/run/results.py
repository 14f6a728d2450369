"""Files that a finished run leaves behind, besides its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import tensorflow as tf

from pipeline.storage.files import atomic_directory
from trainer.config.run_files import read_result

PREDICTIONS_FILE = "predictions.npz"  # of `student` on --eval_split

NOT_EVALUATED = "the store has no teacher outputs for a held-out split"

# Entries of result.json about the training; kept when a finished run is only evaluated again.
OF_TRAINING = ("first_step", "seconds", "seconds_a_step", "epochs_written_back", "teacher_forward_passes")


def export_student(student: tf.keras.Model, path: Path) -> Path:
    """Writes a student as a SavedModel, atomically; returns `path`."""
    with atomic_directory(path, replace=True) as fresh:
        student.save(fresh, include_optimizer=False)
    return path


def previous_result(workdir: Path, *, steps: int | float) -> dict[str, Any] | None:
    """Content of result.json; None if it is missing, damaged, or of a run of another number of steps."""
    try:
        result = read_result(workdir)
    except (OSError, ValueError):
        return None  # it is written again
    return cast(dict[str, Any], result) if result["steps"] == steps else None
