"""What a finished run leaves: figures of the student on every held-out split, and the student itself."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from pipeline.storage.files import atomic_directory, remove_directory, write_json
from trainer.config.run_files import RESULT_FILE, read_result

if TYPE_CHECKING:
    from trainer.run.training import Run

STUDENT_DIRECTORY = "student"  # as trained to the end, which is what function matching is about
BEST_DIRECTORY = "student_best"  # of the best evaluation on the way
PREDICTIONS_FILE = "predictions.npz"  # of the student as trained to the end, on the split of `--eval_split`

NOT_EVALUATED = "the store has no evaluation logits of a held-out split"

# What result.json says of the training: not measured again when a finished run is only evaluated again.
_OF_TRAINING = ("first_step", "seconds", "seconds_a_step", "epochs_written_back", "teacher_forward_passes")


def export_student(student: tf.keras.Model, path: Path) -> Path:
    """Writes a student as a SavedModel, whole or not at all."""
    with atomic_directory(path, replace=True) as fresh:
        student.save(fresh, include_optimizer=False)
    return path


def finished_result(run: Run) -> dict[str, Any] | None:
    """What result.json says, if the run there has done every step that is asked for and has written it all.

    It has not if the store has evaluation logits of other splits now, or another split is to say which student
    is the best: such a run is evaluated again, with no step more.
    """
    if run.checkpoints.latest_step() != run.options.length.steps:
        return None
    result = _previous_result(run)
    if result is None or result.get("eval_split") != run.options.eval_split:
        return None
    names = [STUDENT_DIRECTORY] + [BEST_DIRECTORY] * (result.get("best") is not None)
    names += [PREDICTIONS_FILE] * (run.options.eval_split is not None)
    whole = all((run.workdir / name).exists() for name in names)
    if not whole or list(result["evaluation"]) != run.store.held_out_splits:
        return None
    print("nothing to do: the run there is finished", flush=True)
    return result


def _previous_result(run: Run) -> dict[str, Any] | None:
    """What result.json says of a run of these very steps; None where it is missing, damaged or of others."""
    try:
        result: dict[str, Any] = read_result(run.workdir)  # type: ignore[assignment]
    except (OSError, ValueError):
        return None  # it is written again
    return result if result["steps"] == run.options.length.steps else None


def finish(run: Run, training: dict[str, Any]) -> dict[str, Any]:
    """The chief evaluates on every held-out split that the store knows, and exports.

    Args:
      run: after its last step.
      training: what result.json says of the training.

    Returns:
      What result.json says; of a worker that is not the chief, what it says of the training.
    """
    if not run.workers.chief:
        return training
    store, options = run.store, run.options
    evaluations = {
        name: run.evaluated.get(name) or run.evaluator(name).evaluate(run.student).to_json()
        for name in store.held_out_splits
    }
    if options.eval_split is not None:
        run.evaluator(options.eval_split).write_predictions(run.student, run.workdir / PREDICTIONS_FILE)
    export_student(run.student, run.workdir / STUDENT_DIRECTORY)
    best = _export_best(run)
    if training["first_step"] == training["steps"] and (previous := _previous_result(run)) is not None:
        training |= {name: previous[name] for name in _OF_TRAINING if name in previous}
    result = {
        **training,
        "spec": store.spec.digest(),
        "student": options.recipe.student,
        "parameters": run.student.count_params(),
        "epochs": options.length.epochs,
        "store_bytes": store.views.manifest.bytes,
        "evaluation": evaluations,
        **({} if evaluations else {"not_evaluated": NOT_EVALUATED}),
        "eval_split": options.eval_split,
        "best": best,
    }
    write_json(run.workdir / RESULT_FILE, result)
    return result


def _export_best(run: Run) -> dict[str, Any] | None:
    """Exports the student of the best checkpoint; its step and evaluation, None where nothing was evaluated."""
    path, found = run.workdir / BEST_DIRECTORY, run.checkpoints.best()
    if found is None:
        remove_directory(path)
        return None
    step, evaluation = found
    if step == run.options.length.steps:  # the same weights, and the same files
        with atomic_directory(path, replace=True) as fresh:
            shutil.copytree(run.workdir / STUDENT_DIRECTORY, fresh)
    else:
        run.checkpoints.restore_best(run.student)
        export_student(run.student, path)
        run.checkpoints.restore()
    return {"step": step, **evaluation}
