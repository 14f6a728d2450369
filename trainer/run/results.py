"""Files that a finished run leaves behind, besides its checkpoints."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, cast

import tensorflow as tf

from pipeline.errors import UserError
from pipeline.errors.causes import first_line
from pipeline.storage.files import TEMPORARY, atomic_directory
from trainer.config.run_files import read_result

PREDICTIONS_FILE = "predictions.npz"  # of `student` on --eval_split

NOT_EVALUATED = "the store has no teacher outputs for a held-out split"

# Entries of result.json about the training; kept when a finished run is only evaluated again.
OF_TRAINING = (
    *("first_step", "seconds", "seconds_a_step", "epochs_written_back", "teacher_forward_passes"),
    *("skipped_steps", "loss_scale"),
)


def export_student(student: tf.keras.Model, path: Path) -> Path:
    """Writes a student as a SavedModel, atomically; returns `path`."""
    with atomic_directory(path, replace=True) as fresh:
        student.save(fresh, include_optimizer=False)
    return path


def check_export(student: tf.keras.Model, workdir: Path, *, name: str) -> None:
    """Exports a student of the user to a temporary directory, so that a layer that cannot be exported is found before the run.

    Raises:
      UserError: it cannot be exported.
    """
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=workdir) as place:
        try:
            export_student(student, Path(place) / "student")
        except Exception as error:  # any, from the user's layers
            raise UserError(
                f"`student`={name}: cannot be exported: {type(error).__name__}: {first_line(error)}; keep the variables of a layer in "
                "its attributes, and give it a `get_config` that returns the arguments of its constructor"
            ) from error


def previous_result(workdir: Path, *, steps: int | float) -> dict[str, Any] | None:
    """Content of result.json; None if it is missing, damaged, or of a run of another number of steps."""
    try:
        result = read_result(workdir)
    except (OSError, ValueError):
        return None  # it is written again
    return cast(dict[str, Any], result) if result["steps"] == steps else None
