"""Finished runs, read from their directories: curves, predictions and weights, without building a model."""

from __future__ import annotations

import dataclasses
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from pipeline.errors import DataError, UserError
from trainer.comparison.pair_figures import Curve
from trainer.config.run_files import (
    RESULT_FILE,
    STUDENT_DIRECTORY,
    RunConfig,
    RunResult,
    read_config,
    read_metrics,
    read_result,
    stores_of,
)
from trainer.run.checkpoints import read_run, saved_path
from trainer.run.results import PREDICTIONS_FILE
from trainer.targets.arms import ARMS, OFFLINE

_POINTS = 2000  # maximum number of points of a curve in result.json
_STATISTICS = ("moving_mean", "moving_variance")  # batch normalization averages, which are no weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """A finished and evaluated run of `trainer.train`."""

    directory: Path
    config: RunConfig
    result: RunResult
    lines: list[dict[str, Any]] = dataclasses.field(repr=False)

    @classmethod
    def load(cls, directory: Path) -> FinishedRun:
        """Reads the directory of a run.

        Raises:
          UserError: the directory contains no finished and evaluated run.
          DataError: a file of the run is damaged.
        """
        if not is_finished(directory):
            raise UserError(
                f"{directory}: contains no finished run; finish it with the command that started it, or leave it out"
            )
        try:
            run = cls(
                directory=directory,
                config=read_config(directory),
                result=read_result(directory),
                lines=read_metrics(directory),
            )
            if run.arm not in ARMS:
                raise ValueError(f"arm {run.arm}: expected one of {', '.join(ARMS)}")
            if run.result["eval_split"] not in run.result["evaluation"]:
                raise ValueError(f"no evaluation on {run.result['eval_split']} in {RESULT_FILE}")
        except (OSError, ValueError) as error:
            raise _damaged(directory, error) from error
        return run

    @property
    def arm(self) -> str:
        return self.config["flags"].get("arm", OFFLINE.name)

    @property
    def seed(self) -> int:
        return self.config["flags"]["seed"]

    @property
    def steps(self) -> int:
        return self.result["steps"]

    @property
    def batch_size(self) -> int:
        return self.config["recipe"]["batch_size"]

    @property
    def warmup_steps(self) -> int:
        """Warm-up steps of the schedule, resolved for the length of the run."""
        return self.config["warmup_steps"]

    @property
    def epochs(self) -> float:
        """Epochs requested, if they give the run's steps; the rounded number of trained epochs otherwise."""
        requested = self.config["flags"]["epochs"] or self.config["recipe"].get("epochs")
        num_examples = self.config["length"]["num_examples"]
        # Not those of a run that kept its length when it was continued, or was given in steps.
        if (
            isinstance(requested, int | float)
            and int(requested) * num_examples // self.batch_size == self.steps
        ):
            return int(requested)
        trained = self.result["epochs"]
        return round(trained) if trained >= 1 else trained

    @property
    def evaluation(self) -> dict[str, Any]:
        """Evaluation of the final student on the split of `--eval_split`."""
        # The last evaluation in metrics.jsonl may be on another split, the one of `--eval_split` during training.
        return {**self.result["evaluation"][str(self.result["eval_split"])]}

    @property
    def _evaluations(self) -> list[dict[str, Any]]:
        kind = f"eval_{self.result['eval_split']}"
        return [line for line in self.lines if line["kind"] == kind]

    @property
    def _training(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["kind"] == "train"]

    def curve(self, name: str) -> Curve:
        """A logged figure of the training by step, such as `loss` or `learning_rate`."""
        lines = [line for line in self._training if name in line]
        return Curve(
            np.array([line["step"] for line in lines], np.int64),
            np.array([line[name] for line in lines], np.float64),
        )

    @property
    def seconds_a_step(self) -> float | None:
        """Mean seconds per step over all sessions, excluding tracing, evaluations and checkpoints."""
        rates = [line["views_per_second"] for line in self._training if "views_per_second" in line]
        return float(self.batch_size * np.mean(1 / np.array(rates))) if rates else None

    def predictions(self) -> tuple[np.ndarray, np.ndarray]:
        """Predicted class and label of each evaluated image.

        Returns:
          int32 [n] each.

        Raises:
          DataError: the file is damaged.
        """
        path = self.directory / PREDICTIONS_FILE
        try:
            with path.open("rb") as file, np.load(file) as kept:
                found, labels = kept["top1"], kept["labels"]
            if (found.dtype, found.ndim, found.shape) != (
                np.int32,
                1,
                labels.shape,
            ) or labels.dtype != np.int32:
                raise ValueError(f"{found.dtype} {found.shape} and {labels.dtype} {labels.shape}")
        except (OSError, ValueError, KeyError, EOFError, MemoryError, zipfile.BadZipFile) as error:
            raise DataError(
                f"{path}: not the predictions of a run ({error}); repeat the run in another --workdir"
            ) from error
        return found, labels

    def weights(self) -> dict[str, np.ndarray]:
        """Weights of the final student by name, without the averages of batch normalization.

        Raises:
          UserError: the checkpoint is missing.
          DataError: the checkpoint is damaged.
        """
        path = saved_path(self.directory / "checkpoints")
        if path is None:
            raise UserError(
                f"{self.directory}: the checkpoints are missing, so weights cannot be compared; repeat the run"
            )
        try:
            reader = tf.train.load_checkpoint(path)
            names = [
                name
                for name in reader.get_variable_to_shape_map()
                if name.startswith("student/")
                and name.endswith("VARIABLE_VALUE")
                and "OPTIMIZER_SLOT" not in name
                and not any(f"/{statistic}/" in name for statistic in _STATISTICS)
            ]
            return {name: reader.get_tensor(name) for name in sorted(names)}
        except (tf.errors.OpError, ValueError, RuntimeError) as error:
            raise DataError(
                f"{path}: cannot be read as a checkpoint; repeat the run in another --workdir"
            ) from error

    def to_json(self, *, relative_to: Path) -> dict[str, Any]:
        """The row in `runs` of the comparison's result.json."""
        final, mean = self.evaluation, self.seconds_a_step
        losses, rates = self.curve("loss"), self.curve("learning_rate")
        return {
            "arm": self.arm,
            "seed": self.seed,
            "epochs": self.epochs,
            "steps": self.steps,
            "warmup_steps": self.warmup_steps,
            "batch_size": self.batch_size,
            "directory": _relative(self.directory, relative_to),
            "top1": final["student_top1"],
            "agreement": final["agreement"],
            "distillation_loss": final["distillation_loss"],
            "seconds": None if mean is None else mean * self.steps,
            "teacher_passes": self.teacher_passes,
            "seconds_a_step": mean,
            "history": [self._history(line, losses, rates) for line in self._evaluations],
            "losses": losses.thinned(_POINTS),
            "learning_rates": rates.thinned(_POINTS),
        }

    @property
    def teacher_passes(self) -> int:
        """Number of views on which a live teacher ran during training."""
        online_from = self.config["length"]["online_from"]
        return (self.steps - online_from) * self.batch_size * len(stores_of(self.config["flags"]))

    def _history(self, line: dict[str, Any], losses: Curve, rates: Curve) -> dict[str, Any]:
        """An evaluation during training, with the training figures of the last step logged before it."""
        step = line["step"]
        row = max(int(np.searchsorted(losses.steps, step, side="right")) - 1, 0)
        logged = len(losses.steps) > 0
        return {
            "step": step,
            "epoch": step * self.batch_size / self.config["length"]["num_examples"],
            "loss": line["distillation_loss"],
            "top1": line["student_top1"],
            "agreement": line["agreement"],
            "training_loss": float(losses.values[row]) if logged else None,
            "learning_rate": float(rates.values[row]) if logged else None,
        }


def _relative(path: Path, base: Path) -> str:
    try:
        return str(path.resolve().relative_to(base.resolve()))
    except ValueError:
        return str(path)


def _damaged(directory: Path, error: Exception) -> DataError:
    return DataError(f"{directory}: cannot be read as a run ({error}); repeat it in another --workdir")


def is_finished(directory: Path, *, steps: int | None = None) -> bool:
    """Whether a directory holds a finished and evaluated run.

    A run that is being extended is not finished: config.json has the new length already. So config.json, result.json and
    the latest checkpoint must agree on the number of steps.

    Args:
      steps: Number of steps that the run must have; any by default.

    Raises:
      DataError: a file of the run is damaged.
    """
    if not all((directory / name).exists() for name in (RESULT_FILE, STUDENT_DIRECTORY, PREDICTIONS_FILE)):
        return False
    try:
        config, result = read_config(directory), read_result(directory)
    except (OSError, ValueError) as error:
        raise _damaged(directory, error) from error
    found = {result["steps"], config["length"].get("steps", result["steps"])}
    if (saved := saved_path(directory / "checkpoints")) is not None:
        found.add(read_run(saved)["step"])
    return result["eval_split"] is not None and found == {result["steps"] if steps is None else steps}
