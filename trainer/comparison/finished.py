"""Finished runs as they lie in their directories: curves, predictions and weights, without building a model."""

from __future__ import annotations

import dataclasses
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from pipeline.errors import DataError, UserError
from trainer.comparison.pair_figures import Curve
from trainer.config.run_files import RESULT_FILE, RunConfig, RunResult, read_config, read_metrics, read_result
from trainer.run.checkpoints import saved_path
from trainer.run.results import PREDICTIONS_FILE, STUDENT_DIRECTORY
from trainer.targets.arms import ARMS, OFFLINE

_POINTS = 2000  # of a curve in result.json
_STATISTICS = ("moving_mean", "moving_variance")  # of batch normalisation: averages, not weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """A run of `trainer.train` that has done all its steps.

    Attributes:
      directory: of the run.
      config: what config.json says, `flags`, `recipe` and `length` among it.
      result: what result.json says.
      lines: those of metrics.jsonl.
    """

    directory: Path
    config: RunConfig
    result: RunResult
    lines: list[dict[str, Any]] = dataclasses.field(repr=False)

    @classmethod
    def load(cls, directory: Path) -> FinishedRun:
        """Reads a run's directory.

        Raises:
          UserError: there is no finished run, or it was not evaluated.
          DataError: a file of it is damaged.
        """
        if not is_finished(directory):
            raise UserError(
                f"{directory}: no finished run is there; finish it with the command that began it, or leave it out"
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
            raise DataError(
                f"{directory}: cannot be read as a run ({error}); run it again elsewhere"
            ) from error
        return run

    @property
    def arm(self) -> str:
        """Name of the arm."""
        return self.config["flags"].get("arm", OFFLINE.name)

    @property
    def seed(self) -> int:
        """Of the student."""
        return self.config["flags"]["seed"]

    @property
    def steps(self) -> int:
        """T."""
        return self.result["steps"]

    @property
    def batch_size(self) -> int:
        """B."""
        return self.config["recipe"]["batch_size"]

    @property
    def warmup_steps(self) -> int:
        """Of the schedule, as resolved for the run's length."""
        return self.config["warmup_steps"]

    @property
    def epochs(self) -> float:
        """That were asked for, the last of which may lack views that fill no batch; of a run of `--steps`, what they are."""
        asked = self.config["flags"]["epochs"] or self.config["recipe"].get("epochs")
        if not self.config["flags"].get("steps") and isinstance(asked, int | float) and asked:
            return int(asked)
        done = self.result["epochs"]
        return round(done) if done >= 1 else done

    @property
    def evaluation(self) -> dict[str, Any]:
        """Of the student as trained to the end, on the split of `--eval_split`."""
        # Of metrics.jsonl the last line may be of another split: that of `--eval_split` when the run was trained.
        return {**self.result["evaluation"][str(self.result["eval_split"])]}

    @property
    def _evaluations(self) -> list[dict[str, Any]]:
        kind = f"eval_{self.result['eval_split']}"
        return [line for line in self.lines if line["kind"] == kind]

    @property
    def _training(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["kind"] == "train"]

    def curve(self, name: str) -> Curve:
        """A figure of the training by step, as logged: `loss`, `learning_rate`, ..."""
        lines = self._training
        return Curve(
            np.array([line["step"] for line in lines], np.int64),
            np.array([line[name] for line in lines], np.float64),
        )

    @property
    def seconds_a_step(self) -> float | None:
        """Mean over all sessions of the run, without tracing, evaluations and checkpoints."""
        rates = [line["views_per_second"] for line in self._training if "views_per_second" in line]
        return float(self.batch_size * np.mean(1 / np.array(rates))) if rates else None

    def predictions(self) -> tuple[np.ndarray, np.ndarray]:
        """What the student takes each evaluated image for, and its label: int32 [n] each.

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
                f"{path}: not the predictions of a run ({error}); run it again elsewhere"
            ) from error
        return found, labels

    def weights(self) -> dict[str, np.ndarray]:
        """The student's weights as trained to the end, without averages of batch normalisation, by name.

        Raises:
          UserError: the checkpoint is gone.
          DataError: it is damaged.
        """
        path = saved_path(self.directory / "checkpoints")
        if path is None:
            raise UserError(
                f"{self.directory}: its checkpoints are gone, and with them its weights; run it again"
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
            raise DataError(f"{path}: cannot be read as a checkpoint; run it again elsewhere") from error

    def to_json(self, *, relative_to: Path) -> dict[str, Any]:
        """As the comparison's result.json holds it."""
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
        """Views that a live teacher saw in training."""
        online_from = self.config["length"]["online_from"]
        return (self.steps - online_from) * self.batch_size

    def _history(self, line: dict[str, Any], losses: Curve, rates: Curve) -> dict[str, Any]:
        """An evaluation on the way: held-out figures, and the training's of the last logged step up to it."""
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


def is_finished(directory: Path, *, steps: int | None = None) -> bool:
    """Whether a run's directory holds a finished, evaluated run; of so many steps, if given."""
    try:
        result = read_result(directory)
    except (OSError, ValueError):
        return False
    whole = all((directory / name).exists() for name in (STUDENT_DIRECTORY, PREDICTIONS_FILE))
    return whole and result["eval_split"] is not None and steps in (None, result["steps"])
