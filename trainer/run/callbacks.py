"""What a run says of itself while it trains: progress bar, metrics.jsonl, TensorBoard, checkpoints, evaluation."""

from __future__ import annotations

import contextlib
import dataclasses
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


class DivergedError(UserError):
    """A figure of the run is not a finite number."""


class MetricsLog:
    """`metrics.jsonl` and TensorBoard: one object a log step, appended as it happens.

    Args:
      workdir: of the run.
      step: that the run goes on from; what an earlier run wrote of later steps is dropped, for it will be
        written again.
      writes: False checks figures and writes none: of several workers, only the chief writes.

    Attributes:
      kept: evaluations of that very step.
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
        """Appends `{"step": step, "kind": prefix, **figures}` and shows numbers in TensorBoard.

        Raises:
          DivergedError: a figure is not finite, which JSON could not hold either.
        """
        _check_finite(step, figures)
        if not self._writes:
            return
        with self._board.as_default(step):
            for name, value in figures.items():
                if isinstance(value, int | float):
                    tf.summary.scalar(f"{prefix}/{name}", value)
        if prefix != TRAIN:
            # An evaluation whose line is there is not made again, and no checkpoint follows that would flush first.
            self._board.flush()
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, "kind": prefix, **figures}, allow_nan=False) + "\n")

    def flush(self) -> None:
        """Before a checkpoint: what TensorBoard is told up to it is not told again by a run that goes on from it."""
        if self._writes:
            self._board.flush()

    def close(self) -> None:
        """Flushes TensorBoard's file."""
        if self._writes:
            self._board.close()


def _check_finite(step: int, figures: dict[str, Any]) -> None:
    for name, value in figures.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise DivergedError(
                f"step {step}: the {name} is {value}; lower --learning_rate, and start in another --workdir"
            )


def _start_session(board: tf.summary.SummaryWriter, *, after: int) -> None:
    """Makes TensorBoard drop what earlier files tell of later steps: every start of a session but the first does."""
    start = tf.compat.v1.SessionLog(status=tf.compat.v1.SessionLog.START)
    event = tf.compat.v1.Event(wall_time=time.time(), step=after + 1, session_log=start)
    # The writer has no method for it, and its resource no public name.
    tf.raw_ops.ImportEvent(writer=board._resource, event=event.SerializeToString())


def _lines_until(path: Path, step: int) -> tuple[list[str], list[dict[str, Any]]]:
    """Lines of a metrics file up to and with `step`, and the evaluations of `step` itself.

    A half-written last line is dropped, and a damaged evaluation of `step`, which is made again.
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
    """By which evaluations are compared: the student's accuracy, or its agreement where no image is labeled."""
    found = figures.get("student_top1")
    return float(figures.get("agreement", -math.inf) if found is None else found)


@dataclasses.dataclass
class Timing:
    """Steps and their seconds, without tracing, evaluations and checkpoints at their ends."""

    steps: int = 0
    seconds: float = 0.0

    def add(self, steps: int, seconds: float) -> None:
        """Counts some steps more."""
        self.steps += steps
        self.seconds += seconds

    @property
    def seconds_a_step(self) -> float:
        """Mean."""
        return self.seconds / max(self.steps, 1)


class RunCallback(tf.keras.callbacks.Callback):
    """Counts steps over all calls of `fit`, and does what is due after each.

    Keras calls it once an execution, of one step or several: what is due after a step inside of one is done at
    its end. Intervals end with an execution.

    Attributes:
      step: finished steps of the run.
      source: where the targets come from now, `replay` or `online`.
      timings: of this part of the run, by source.
      last: figures of the evaluation of this very step on the evaluator's split, or None.
      pauses_at: step inside an interval at which `fit` ends, to go on later; None for none.
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
        # Tensors, so that a step that nothing is due after does not wait for the device.
        self._supports_tf_logs = True
        self.step = step
        self.timings: dict[str, Timing] = {}
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
            total=length.steps * length.batch_size,  # `inf` is no total: a rate, and no time to the end
            initial=step * length.batch_size,
            unit=" views",
            desc="train",
            dynamic_ncols=True,
            disable=not self._workers.chief,
        )
        self._agreed = False  # that the run ends, among several workers
        self._since: tuple[int, float] | None = None  # (step, time) of the latest log
        self._begun = step  # steps before this interval

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """An interval begins: what came before it, an evaluation say, is no training time."""
        del logs
        # The first of a call of `fit` traces and fills the pipeline: it counts from its first execution's end.
        self._since = None if epoch == 0 else (self.step, time.perf_counter())
        self._begun = self.step

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """After each execution; `batch` is the number of its last step in the interval, from 0."""
        self._preemption.defer()
        before, self.step = self.step, self._begun + batch + 1
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
        """Whether a signal came, to this worker or another; they ask each other where all wait for a log anyway."""
        if self._workers.count == 1:
            return self._preemption.requested is not None
        if logged and (number := self._workers.gather(self._preemption.requested or 0).max()):
            self._preemption.requested = signal.Signals(number)
            self._agreed = True
        return self._agreed

    def _save(self) -> None:
        """Saves; ends the run if it was asked to, and if all workers know."""
        for weight in self.model.trainable_variables:
            if not bool(tf.reduce_all(tf.math.is_finite(weight))):
                raise DivergedError(
                    f"step {self.step}: {weight.name} is not finite; lower --learning_rate, and start in another --workdir"
                )
        self._log.flush()
        self._checkpoints.save(self.step)
        if self._workers.count == 1 or self._agreed or self.step == self._length.steps:
            self._preemption.resume(f"saved at step {self.step}")

    def _due(self, before: int, every: int) -> bool:
        """Whether a multiple of `every` is among the steps since `before`."""
        return self.step // every > before // every

    def _write(self, logs: dict[str, Any]) -> None:
        figures: dict[str, Any] = {name: float(value) for name, value in logs.items() if name != "views"}
        now = time.perf_counter()  # after the values have come from the device
        figures["epoch"] = self.step * self._length.batch_size / self._length.num_examples
        figures["learning_rate"] = self._learning_rate(self.step - 1)
        if "views" in logs:
            figures |= name_views(np.asarray(logs["views"]))
        if self._since is not None and self.step > self._since[0]:
            steps, seconds = self.step - self._since[0], now - self._since[1]
            figures["views_per_second"] = steps * self._length.batch_size / seconds
            self.timings.setdefault(self.source, Timing()).add(steps, seconds)
        self._since = (self.step, now)
        self._log.write(self.step, figures, prefix=TRAIN)
        self._bar.set_postfix(loss=f"{figures.get('loss', float('nan')):.4f}", refresh=False)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """An interval ends: saves, then evaluates, which takes long and may be made up for."""
        del epoch, logs
        if self.step != self.pauses_at:
            self._save()
            self._evaluate()

    def pause(self, what: str) -> None:
        """While the run waits: saves, shows what it waits for, and ends the run if it was asked to."""
        self._asked_to_stop(logged=True)
        self._bar.set_description_str(what)
        self._save()

    def go_on(self) -> None:
        """After a pause."""
        self._bar.set_description_str("train")

    def catch_up(self) -> None:
        """Evaluates the interval that an earlier run ended with, if it had no time to."""
        if self.last is None:
            self._evaluate()

    def _best_score(self, split: str) -> float | None:
        """Score of the best checkpoint up to this step, None where any evaluation is better.

        A score on another split is no bound. But where no step is left, the best checkpoint on the other split stays: it
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
        split, found = self._evaluator.split, self._evaluator.evaluate(self.model.student)
        figures = found.to_json()
        _check_finite(self.step, figures)
        # Before the line that says that it is done: a run that dies in between does both again.
        if self._best is None or _score(figures) > self._best:
            self._best = _score(figures)
            self._checkpoints.save_best(self.step, {"split": split, **figures})
        self._log.write(self.step, figures, prefix=f"eval_{split}")
        self.last = figures
        tqdm.write(
            f"step {self.step}: {split} top-1 {accuracy_text(found.student_top1)}, agreement {found.agreement:.2%}, "
            f"distillation loss {found.distillation_loss:.4f}{unlabeled_text(figures)}"
        )

    def close(self) -> None:
        """Ends the bar and the log."""
        self._bar.close()
        self._log.close()
