"""Callback of `fit` for progress bar, metrics.jsonl, TensorBoard, checkpoints and evaluations."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from pipeline.errors import UserError
from pipeline.storage.files import write_text
from trainer.config.run_files import METRICS_FILE, TRAIN, parse_line, parse_step
from trainer.config.run_length import RunLength, name_views
from trainer.distribution.workers import Workers
from trainer.run.checkpoints import Checkpoints
from trainer.run.evaluation import Evaluator, accuracy_text, unlabeled_text
from trainer.run.preemption import Preemption
from trainer.step.loss_scaling import SMALLEST_SCALE


class DivergedError(UserError):
    """A loss, figure or weight is not a finite number."""


class MetricsLog:
    """Writes `metrics.jsonl`, one line per log step, and TensorBoard.

    Args:
      step: step that the run continues from. Lines of later steps, which an earlier process wrote, are removed: they are
        written again.
      writes: False for workers other than the chief: figures are checked, and nothing is written.

    Attributes:
      kept: evaluations of exactly that step.
    """

    def __init__(self, workdir: Path, *, step: int, writes: bool = True) -> None:
        self._path = workdir / METRICS_FILE
        self._writes = writes
        lines, self.kept = _lines_until(self._path, step) if self._path.exists() else ([], [])
        if self._path.exists() and writes:
            write_text(self._path, "".join(lines))
        if writes:
            self._board = tf.summary.create_file_writer(str(workdir / "tensorboard"))
            _start_session(self._board, after=step)

    def write(self, step: int, figures: dict[str, Any], *, prefix: str) -> None:
        """Appends `{"step": step, "kind": prefix, **figures}`, and sends numbers to TensorBoard.

        Raises:
          DivergedError: a figure is not finite.
        """
        _check_finite(step, figures)
        if not self._writes:
            return
        with self._board.as_default(step):
            for name, value in figures.items():
                if isinstance(value, int | float):
                    tf.summary.scalar(f"{prefix}/{name}", value)
        if prefix != TRAIN:
            # An evaluation with a line is not repeated, and no checkpoint follows that would flush first.
            self._board.flush()
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, "kind": prefix, **figures}, allow_nan=False) + "\n")

    def flush(self) -> None:
        """Flushes TensorBoard. Called before a checkpoint: a run that continues from it does not repeat earlier steps."""
        if self._writes:
            self._board.flush()

    def close(self) -> None:
        """Closes TensorBoard's file."""
        if self._writes:
            self._board.close()


def _check_finite(step: int, figures: dict[str, Any]) -> None:
    for name, value in figures.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise DivergedError(
                f"step {step}: the {name} is {value}; lower --learning_rate, and start in another --workdir"
            )


def _without_overflow(step: int, figures: dict[str, Any]) -> dict[str, Any]:
    """The figures of a step with a loss scale, without those that are not finite because the step was skipped.

    Raises:
      DivergedError: no smaller loss scale would help.
    """
    if unfit := figures.pop("unfit_steps"):
        raise DivergedError(
            f"step {step}: the logits to match were not finite in {unfit} of the steps so far; check the teacher, and start in "
            "another --workdir"
        )
    if math.isfinite(figures["gradient_norm"]):
        return figures
    if figures["loss_scale"] <= SMALLEST_SCALE:
        raise DivergedError(
            f"step {step}: the gradients are not finite, and the loss scale is down to {figures['loss_scale']:g}, after "
            f"{figures['skipped_steps']} skipped steps; use --precision=float32 or bfloat16, or a lower --learning_rate, in another "
            "--workdir"
        )
    return {name: value for name, value in figures.items() if math.isfinite(value)}


def _start_session(board: tf.summary.SummaryWriter, *, after: int) -> None:
    """Writes a session start, which makes TensorBoard drop the later steps of earlier files."""
    start = tf.compat.v1.SessionLog(status=tf.compat.v1.SessionLog.START)
    event = tf.compat.v1.Event(wall_time=time.time(), step=after + 1, session_log=start)
    # The writer has no method for it, and no public attribute for its resource.
    tf.raw_ops.ImportEvent(writer=board._resource, event=event.SerializeToString())


def _lines_until(path: Path, step: int) -> tuple[list[str], list[dict[str, Any]]]:
    """Lines of a metrics file up to and including `step`, and the evaluations of `step` itself.

    Drops a half-written last line, and damaged evaluations of `step`, which are repeated.
    """
    lines, kept = [], []
    for line in path.read_text(errors="replace").splitlines(keepends=True):
        with contextlib.suppress(ValueError):
            if line.endswith("\n") and (found := parse_step(line))["step"] <= step:
                if found["step"] == step and found["kind"] != TRAIN:
                    kept.append(parse_line(line))
                lines.append(line)
    return lines, kept


def _figures(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name not in ("step", "kind")}


def _score(figures: dict[str, Any]) -> float:
    """Criterion for the best evaluation: the student's accuracy, or its agreement with the teacher without labels."""
    found = figures.get("student_top1")
    return float(figures.get("agreement", -math.inf) if found is None else found)


class RunCallback(tf.keras.callbacks.Callback):
    """Counts steps over all calls of `fit`; logs, saves and evaluates when due.

    Keras calls it once per execution, of one or several steps. Whatever is due after a step inside an execution happens at
    the end of the execution. Intervals end with an execution.

    Attributes:
      step: completed steps.
      source: current source of the targets, `replay` or `online`, for the timings.
      timings: timed steps of this process and their seconds by source, without tracing, evaluations and checkpoints.
      last: evaluation of exactly this step, or None.
      pauses_at: step inside an interval at which `fit` ends and continues later; None for none.
    """

    def __init__(
        self,
        *,
        length: RunLength,
        step: int,
        log: MetricsLog,
        log_every: int,
        checkpoints: Checkpoints,
        checkpoint_every: int,
        preemption: Preemption | None = None,
        workers: Workers | None = None,
        evaluator: Evaluator | None,
        learning_rate: Callable[[int], float],
    ) -> None:
        super().__init__()
        # Logs stay tensors, so that a step with nothing due does not wait for the device.
        self._supports_tf_logs = True
        self.step = step
        self.timings: dict[str, tuple[int, float]] = {}
        self.source = "replay"
        self.pauses_at: int | None = None
        self._length = length
        self._log = log
        self._log_every = log_every
        self._checkpoints = checkpoints
        self._checkpoint_every = checkpoint_every
        self._preemption = preemption or Preemption()
        self._workers = workers or Workers(tf.distribute.get_strategy())
        self._evaluator = evaluator
        self._learning_rate = learning_rate
        self._kind = None if evaluator is None else f"eval_{evaluator.split}"
        found = [line for line in log.kept if line["kind"] == self._kind]
        self.last: dict[str, Any] | None = _figures(found[0]) if found else None
        self._best = None if evaluator is None else self._best_score(evaluator.split)
        self._bar = tqdm(
            total=length.steps * length.batch_size,  # tqdm takes `inf` for an unknown total
            initial=step * length.batch_size,
            unit=" views",
            desc="train",
            dynamic_ncols=True,
            disable=not self._workers.chief,
        )
        self._all_stop = False  # whether several workers have agreed to end the run
        self._since: tuple[int, float] | None = None  # step and time of the latest log
        self._interval_start = step

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Restarts the timing at the start of an interval, to exclude the evaluation before it."""
        del logs
        # The first execution of a call of `fit` traces and fills the pipeline, and is not timed.
        self._since = None if epoch == 0 else (self.step, time.perf_counter())
        self._interval_start = self.step

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Logs and saves after an execution; `batch` is its last step in the interval, from 0."""
        self._preemption.defer()
        before, self.step = self.step, self._interval_start + batch + 1
        self.last = None
        self._bar.update((self.step - before) * self._length.batch_size)
        if self._since is None:
            self._since = (self.step, time.perf_counter())
        logged = self._due(before, self._log_every) or self.step == self._length.steps
        if logged:
            self._write(logs or {})
        if self._due(before, self._checkpoint_every) or self._asked_to_stop(logged=logged):
            self._save()

    def _asked_to_stop(self, *, logged: bool) -> bool:
        """Whether this or another worker got a signal. Workers ask each other only after logging, which waits anyway."""
        if self._workers.count == 1:
            return self._preemption.requested is not None
        if logged and (number := self._workers.gather(self._preemption.requested or 0).max()):
            self._preemption.requested = signal.Signals(number)
            self._all_stop = True
        return self._all_stop

    def _save(self) -> None:
        """Saves a checkpoint, and ends the run if a signal came and all workers know of it."""
        for weight in self.model.trainable_variables:
            if not bool(tf.reduce_all(tf.math.is_finite(weight))):
                raise DivergedError(
                    f"step {self.step}: {weight.name} is not finite; lower --learning_rate, and start in another --workdir"
                )
        self._log.flush()
        self._checkpoints.save(self.step)
        if self._workers.count == 1 or self._all_stop or self.step == self._length.steps:
            self._preemption.resume(f"saved at step {self.step}")

    def _due(self, before: int, every: int) -> bool:
        """Whether the steps since `before` include a multiple of `every`."""
        return self.step // every > before // every

    def _write(self, logs: dict[str, Any]) -> None:
        figures: dict[str, Any] = {
            name: np.asarray(value).item() for name, value in logs.items() if name != "views"
        }
        if "loss_scale" in figures:
            figures = _without_overflow(self.step, figures)
        now = time.perf_counter()  # after the values have arrived from the device
        figures["epoch"] = self.step * self._length.batch_size / self._length.num_examples
        figures["learning_rate"] = self._learning_rate(self.step - 1)
        if "views" in logs:
            figures |= name_views(np.asarray(logs["views"]))
        if self._since is not None and self.step > self._since[0]:
            steps, seconds = self.step - self._since[0], now - self._since[1]
            figures["views_per_second"] = steps * self._length.batch_size / seconds
            timed = self.timings.get(self.source, (0, 0.0))
            self.timings[self.source] = timed[0] + steps, timed[1] + seconds
        self._since = (self.step, now)
        self._log.write(self.step, figures, prefix=TRAIN)
        self._bar.set_postfix(loss=f"{figures.get('loss', float('nan')):.4f}", refresh=False)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Saves, then evaluates, at the end of an interval. An interrupted evaluation is repeated later."""
        del epoch, logs
        if self.step != self.pauses_at:
            self._save()
            self._evaluate()

    def pause(self, reason: str) -> None:
        """Saves and shows the reason while the run waits; ends the run if a signal came."""
        self._asked_to_stop(logged=True)
        self._bar.set_description_str(reason)
        self._save()

    def resume(self) -> None:
        """Shows that the run continues."""
        self._bar.set_description_str("train")

    def catch_up(self) -> None:
        """Evaluates this step if the process that trained it was interrupted before."""
        if self.last is None:
            self._evaluate()

    def _best_score(self, split: str) -> float | None:
        """Score of the best checkpoint up to this step; None if any evaluation is better.

        A score on another split is no bound. But after the last step the best checkpoint on another split stays, because it
        could not be made again.
        """
        found = self._checkpoints.best()
        if found is None or found[0] > self.step:
            return None
        if found[1].get("split") != split:
            return math.inf if self.step == self._length.steps else None
        return _score(found[1])

    def _evaluate(self) -> None:
        if self._evaluator is None:
            return
        split = self._evaluator.split
        figures: dict[str, Any] = {**self._evaluator.evaluate(self.model.student)}
        _check_finite(self.step, figures)
        # Before the line in metrics.jsonl: a run that is interrupted in between repeats both.
        if self._best is None or _score(figures) > self._best:
            self._best = _score(figures)
            self._checkpoints.save_best(self.step, {"split": split, **figures})
        self._log.write(self.step, figures, prefix=f"eval_{split}")
        self.last = figures
        tqdm.write(
            f"step {self.step}: {split} top-1 {accuracy_text(figures['student_top1'])}, agreement {figures['agreement']:.2%}, "
            f"distillation loss {figures['distillation_loss']:.4f}{unlabeled_text(figures)}"
        )

    def close(self) -> None:
        """Closes the progress bar and the log."""
        self._bar.close()
        self._log.close()
