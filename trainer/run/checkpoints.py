"""Checkpoints of a run: weights, optimizer state, and the identity of the run.

The identity (step, spec digest, batch size, student, ...) is inside the checkpoint, so that it is written atomically with
the weights: TensorFlow writes temporary files and renames them, the index last.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

import tensorflow as tf

from pipeline.errors import DataError, UserError
from pipeline.errors.causes import first_line
from pipeline.storage.checked_json import Count, build, parse_json
from pipeline.store.spec import differences

_RUN_KEY = "run/.ATTRIBUTES/py_state"
# Exceptions of TensorFlow for files that are damaged or belong to another network.
_UNREADABLE = (tf.errors.OpError, ValueError, RuntimeError, LookupError)


class _Scored(TypedDict, total=False):
    """Compared entries of the evaluation in a best checkpoint."""

    split: str
    student_top1: float | None
    agreement: float


class _SavedRun(TypedDict):
    """State of the run in a checkpoint. The other entries are the identity, which is compared as a whole."""

    step: Count
    spec: NotRequired[str]
    evaluation: NotRequired[_Scored]


def saved_path(directory: Path) -> str | None:
    """Path prefix of the latest checkpoint in a directory; None if there is none.

    Raises:
      DataError: the file `checkpoint`, which names the latest checkpoint, is damaged; or it is missing, and there are several
        checkpoints.
    """
    note = directory / "checkpoint"
    try:
        state = tf.train.get_checkpoint_state(str(directory))
    except ValueError:  # empty, or not UTF-8
        state = None
    if state is not None:
        return str(state.model_checkpoint_path)
    if note.exists():
        raise DataError(
            f"{note}: damaged; it names the latest checkpoint in {directory}: restore it from a backup, or start again in "
            "another --workdir"
        )
    # A single checkpoint without the note was interrupted in between; its steps are repeated.
    if len(found := sorted(file.stem for file in directory.glob("ckpt-*.index"))) > 1:
        raise DataError(
            f"{note}: missing; it alone names the latest of {', '.join(found)}: restore it from a backup, or start again in "
            "another --workdir"
        )
    return None


def read_run(path: str) -> dict[str, Any]:
    """Reads the state of the run in a checkpoint: `step`, and the identity (`spec`, `batch_size`, `recipe_name`, ...).

    Raises:
      DataError: the checkpoint cannot be read.
    """
    try:
        found = build(_SavedRun, parse_json(tf.train.load_checkpoint(path).get_tensor(_RUN_KEY).decode()))
    except (*_UNREADABLE, AttributeError) as error:
        raise DataError(
            f"{path}: cannot read the checkpoint: {first_line(error)}; start again in another --workdir"
        ) from error
    return cast(dict[str, Any], found)


class _RunState(tf.train.experimental.PythonState):
    """JSON object in a checkpoint."""

    def __init__(self, value: dict[str, Any]) -> None:
        super().__init__()
        self.value = value

    def serialize(self) -> str:
        return json.dumps(self.value, sort_keys=True)

    def deserialize(self, string_value: str) -> None:
        self.value = parse_json(string_value)


class Checkpoints:
    """The latest checkpoints of a run, and the best one.

    The best checkpoint contains its evaluation, so that both are consistent. It is saved after the latest checkpoint of its
    step, so that it is never ahead of the run.

    Args:
      identity: values that must be the same for a run to continue; `spec` is the store's digest.
      skipped: count of skipped steps, of a run with a loss scale.
      writes: False for workers other than the chief: `save` and `save_best` then do nothing.
    """

    def __init__(
        self,
        directory: Path,
        *,
        student: tf.keras.Model,
        optimizer: tf.keras.optimizers.legacy.Optimizer,
        identity: dict[str, Any],
        skipped: tf.Module | None = None,
        keep: int = 3,
        writes: bool = True,
    ) -> None:
        self._writes = writes
        self._directory = directory
        for place in (directory, directory / "best"):
            saved_path(place)  # TensorFlow's managers would ignore a damaged note
        self._identity = identity
        # Create slots before restoring, so that a checkpoint without them is noticed.
        optimizer._create_all_weights(student.trainable_variables)
        self._run = _RunState({"step": 0, **identity})
        counts = {} if skipped is None else {"skipped": skipped}
        self._checkpoint = tf.train.Checkpoint(student=student, optimizer=optimizer, run=self._run, **counts)
        # Created at the first save otherwise, which is a collective that only the chief would run.
        _ = self._checkpoint.save_counter
        self._latest = tf.train.CheckpointManager(self._checkpoint, str(directory), max_to_keep=keep)
        self._best = tf.train.CheckpointManager(self._checkpoint, str(directory / "best"), max_to_keep=1)

    def latest_step(self) -> int:
        """Step of the latest checkpoint, 0 if there is none. Does not read weights or optimizer state.

        Raises:
          DataError: it belongs to another store.
          UserError: it was made with other flags.
        """
        path = saved_path(self._directory)
        return 0 if path is None else self._step_of(path)

    def _step_of(self, path: str) -> int:
        """Step of a checkpoint, which must belong to this run."""
        found = read_run(path)
        step: int = found.pop("step")
        if lines := differences(self._identity, found, sides=("asked for", "in the checkpoint")):
            kind = DataError if found.get("spec") != self._identity.get("spec") else UserError
            raise kind(
                f"{path}: belongs to another run: {'; '.join(lines)}; pass the same flags and store, or use another --workdir"
            )
        return step

    def restore(self) -> int:
        """Restores the latest checkpoint; returns its step, 0 if there is none. Raises what `latest_step` raises."""
        path = saved_path(self._directory)
        if path is None:
            return 0
        step = self._step_of(path)
        try:
            self._checkpoint.restore(path).assert_consumed()
        except (*_UNREADABLE, AssertionError) as error:
            raise DataError(
                f"{path}: cannot restore the student: {first_line(error)}; start again in another --workdir"
            ) from error
        return step

    def save(self, step: int) -> None:
        """Saves a checkpoint after `step` completed steps, unless it exists."""
        path = self._latest.latest_checkpoint
        if not self._writes or (path is not None and path.endswith(f"-{step}")):
            return
        self._run.value = {"step": step, **self._identity}
        self._latest.save(checkpoint_number=step)

    def save_best(self, step: int, evaluation: dict[str, Any]) -> None:
        """Saves the best checkpoint so far, with its evaluation."""
        if not self._writes:
            return
        self._run.value = {"step": step, "evaluation": evaluation, **self._identity}
        self._best.save(checkpoint_number=step)

    def best(self) -> tuple[int, dict[str, Any]] | None:
        """Step and evaluation of the best checkpoint; None if there is none."""
        path = saved_path(self._directory / "best")
        if path is None:
            return None
        found = read_run(path)
        if "evaluation" not in found:
            raise DataError(f"{path}: has no evaluation, which a best checkpoint has; remove {path}.*")
        return found["step"], found["evaluation"]

    def restore_best(self, student: tf.keras.Model) -> None:
        """Restores the weights of the best checkpoint, and leaves the optimizer unchanged."""
        path = saved_path(self._directory / "best")
        try:
            restored = tf.train.Checkpoint(student=student).read(path)
            restored.assert_existing_objects_matched().expect_partial()
        except (*_UNREADABLE, AssertionError) as error:
            raise DataError(
                f"{path}: cannot restore the best checkpoint: {first_line(error)}; remove {self._directory / 'best'} and run the "
                "same command again, which finishes the run without it"
            ) from error

    def remove_leftovers(self) -> None:
        """Removes leftovers of a killed writer; the caller holds the lock of the work directory."""
        for directory in (self._directory, self._directory / "best"):
            for path in directory.glob("ckpt-*"):
                if path.is_dir():
                    shutil.rmtree(path)
                elif not path.with_name(f"{path.name.split('.')[0]}.index").exists():
                    path.unlink()
