"""What a run says of itself while it trains: progress bar, metrics.jsonl, TensorBoard, checkpoints, evaluation."""

from __future__ import annotations

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
from pipeline.store.files import write_text
from trainer.checkpoints import Checkpoints
from trainer.evaluate import Evaluation, Evaluator
from trainer.preemption import Preemption
from trainer.steps import RunLength, name_views
from trainer.workers import Workers


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
      kept: what it wrote up to that step.
    """

    def __init__(self, workdir: Path, *, step: int, writes: bool = True) -> None:
        self._path = workdir / "metrics.jsonl"
        self._writes = writes
        lines = _lines_until(self._path, step) if self._path.exists() else []
        if self._path.exists() and writes:
            write_text(self._path, "".join(lines))
        self.kept: list[dict[str, Any]] = [json.loads(line) for line in lines]
        if writes:
            self._board = tf.summary.create_file_writer(str(workdir / "tensorboard"))

    def write(self, step: int, figures: dict[str, Any], *, prefix: str) -> None:
        """Appends `{"step": step, "kind": prefix, **figures}` and shows numbers in TensorBoard.

        Raises:
          DivergedError: a figure is not finite, which JSON could not hold either.
        """
        for name, value in figures.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise DivergedError(
                    f"step {step}: the {name} is {value}; lower --learning_rate, and start in another --workdir if the "
                    "latest checkpoint was saved too late"
                )
        if not self._writes:
            return
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, "kind": prefix, **figures}, allow_nan=False) + "\n")
        with self._board.as_default(step):
            for name, value in figures.items():
                if isinstance(value, int | float):
                    tf.summary.scalar(f"{prefix}/{name}", value)

    def close(self) -> None:
        """Flushes TensorBoard's file."""
        if self._writes:
            self._board.close()


def _lines_until(path: Path, step: int) -> list[str]:
    """Whole lines of a metrics file up to and with `step`; a half-written last line is dropped."""
    out = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                out.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    return out


def _best_of(lines: list[dict[str, Any]], *, kind: str) -> Evaluation | None:
    """The best evaluation among lines of metrics.jsonl, the first of equals."""
    names = [field.name for field in dataclasses.fields(Evaluation)]
    found = [Evaluation(**{name: line[name] for name in names}) for line in lines if line["kind"] == kind]
    return max(found, key=lambda evaluation: evaluation.student_top1, default=None)


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
      best: the best evaluation so far, of an earlier part of the run too; `last` the latest of this part.
    """

    _supports_tf_logs = True  # tensors, so that a step that nothing is due after does not wait for the device

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
        self.step = step
        self.last: Evaluation | None = None
        self.best = None if evaluator is None else _best_of(log.kept, kind=f"eval_{evaluator.split}")
        self.timings: dict[str, Timing] = {}
        self.source = "replay"
        self._length = length
        self._log = log
        self._log_every = log_every
        self._checkpoints = checkpoints
        self._checkpoint_every = checkpoint_every
        self._preemption = preemption or Preemption()
        self._workers = workers or Workers(tf.distribute.get_strategy())
        self._evaluator = evaluator
        self._learning_rate = learning_rate
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
        self._log.write(self.step, figures, prefix="train")
        self._bar.set_postfix(loss=f"{figures.get('loss', float('nan')):.4f}", refresh=False)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """An interval ends: saves, then evaluates, which takes long and may be made up for."""
        del epoch, logs
        self._save()
        self._evaluate()

    def catch_up(self) -> None:
        """Evaluates the interval that an earlier run ended with, if it had no time to."""
        kind = None if self._evaluator is None else f"eval_{self._evaluator.split}"
        if not any(line["kind"] == kind and line["step"] == self.step for line in self._log.kept):
            self._evaluate()

    def _evaluate(self) -> None:
        if self._evaluator is None:
            return
        self.last = self._evaluator.evaluate(self.model.student)
        self._log.write(self.step, self.last.to_json(), prefix=f"eval_{self._evaluator.split}")
        tqdm.write(
            f"step {self.step}: {self._evaluator.split} top-1 {self.last.student_top1:.2%}, agreement "
            f"{self.last.agreement:.2%}, distillation loss {self.last.distillation_loss:.4f}"
        )
        if self.best is None or self.last.student_top1 > self.best.student_top1:
            self.best = self.last
            self._checkpoints.save_best(self.step)

    def close(self) -> None:
        """Ends the bar and the log."""
        self._bar.close()
        self._log.close()
