"""Outer loop of a training run: trains in calls of `fit`, checkpoints, evaluates, exports."""

from __future__ import annotations

import dataclasses
import functools
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import tensorflow as tf

from pipeline.errors import DataError, UserError
from pipeline.inputs.dataset import Dataset
from pipeline.inputs.labels import match_classes
from pipeline.storage.files import atomic_directory, remove_directory, write_json
from pipeline.store.reader import StoreReader
from pipeline.store.view_store import ViewStore
from trainer.config.run_files import BEST_DIRECTORY, CONFIG_FILE, RESULT_FILE, STUDENT_DIRECTORY
from trainer.config.run_length import Segment, count_text, segments
from trainer.distribution.workers import SAME_WORKERS, Workers
from trainer.run.callbacks import DivergedError, MetricsLog, RunCallback
from trainer.run.checkpoints import Checkpoints
from trainer.run.evaluation import Evaluator
from trainer.run.failures import PREFETCHED, explain
from trainer.run.following import Following
from trainer.run.options import TrainOptions
from trainer.run.preemption import Preemption
from trainer.run.results import (
    NOT_EVALUATED,
    OF_TRAINING,
    PREDICTIONS_FILE,
    export_student,
    previous_result,
)
from trainer.run.run_schedule import describe_change, previous_schedule
from trainer.run.write_back import Appending, TeacherPass
from trainer.step.distiller import Distiller
from trainer.step.schedules import Scaled
from trainer.targets.batches import Targets
from trainer.targets.online_teacher import OnlineTeachers


@dataclasses.dataclass(kw_only=True)
class Run:
    """A training run and its directory; `trainer.run.builder.build_run` makes one from options.

    Attributes:
      dataset: data set that the views are rendered from.
      distiller: student, loss and optimizer, compiled.
      teachers: live teachers; None if no step needs them.
      teacher_pass: teacher outside of training, for --write_back; None without.
      evaluator: returns the evaluator of a split that the store has teacher outputs for.
      following: waits for views that are not published yet, for --follow; None without.
      evaluated: evaluation of the current student, by split, as far as `train` has evaluated it.
    """

    options: TrainOptions
    store: ViewStore
    dataset: Dataset
    distiller: Distiller
    learning_rate: Scaled
    targets: Targets
    teachers: OnlineTeachers | None
    teacher_pass: TeacherPass | None
    checkpoints: Checkpoints
    evaluator: Callable[[str], Evaluator]
    following: Following | None
    strategy: tf.distribute.Strategy
    workers: Workers
    preemption: Preemption
    evaluated: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    @property
    def student(self) -> tf.keras.Model:
        return self.distiller.student

    @property
    def optimizer(self) -> tf.keras.optimizers.legacy.Optimizer:
        return self.distiller.optimizer

    @property
    def workdir(self) -> Path:
        return Path(self.options.flags.workdir)

    @functools.cached_property
    def _evaluator(self) -> Evaluator | None:
        """The evaluator of `--eval_split`; it keeps the predictions of the last step for `finish`."""
        return None if self.options.eval_split is None else self.evaluator(self.options.eval_split)

    def train(self) -> dict[str, Any]:
        """Trains from the latest checkpoint to the end.

        Returns:
          The entries of result.json that concern the training.

        Raises:
          UserError: the run has more steps than asked for, or diverged.
          DataError: a view, a checkpoint or a teacher output is damaged or mismatched.
        """
        length = self.options.length
        first = self._restore()
        # After every check: a refused run must not change what the directory says was asked.
        if self.workers.chief:
            write_json(self.workdir / CONFIG_FILE, self.options.to_json())
        callback = self._callback(first)
        started = time.monotonic()
        appending = self._appending()
        try:
            evaluation_due = first % self.options.eval_every == 0 or first in (
                length.online_from,
                length.steps,
            )
            if first and evaluation_due:
                callback.catch_up()
            if appending is None:
                self._fit(first, [callback])
            else:
                with appending:
                    appending.begin(first)
                    self._fit(first, [appending.callback, callback])
                    appending.finish()
        finally:
            callback.close()
        if self.options.eval_split is not None and callback.last is not None:
            self.evaluated = {self.options.eval_split: callback.last}
        return {
            "steps": length.steps,
            "first_step": first,
            "seconds": time.monotonic() - started,
            "seconds_a_step": {
                source: seconds / timed for source, (timed, seconds) in callback.timings.items()
            },
            "epochs_written_back": 0 if appending is None else appending.epochs,
            "teacher_forward_passes": len(self.store.stores)
            * (length.steps - max(length.online_from, first))
            * length.batch_size,
            **self._loss_scaling(),
        }

    def _loss_scaling(self) -> dict[str, Any]:
        """Skipped steps of the whole run, and the loss scale after the last one; empty without a loss scale."""
        if (skipped := self.distiller.skipped) is None:
            return {}
        return {
            "skipped_steps": int(tf.convert_to_tensor(skipped.total)),
            "loss_scale": float(self.optimizer.loss_scale),
        }

    def _restore(self) -> int:
        """Restores the latest checkpoint, checks that the run can continue from it, and returns its step."""
        steps = self.options.length.steps
        first = self.checkpoints.restore()
        if self.workers.chief:
            self.checkpoints.remove_leftovers()
        if first > steps:
            raise UserError(
                f"--workdir={self.workdir}: the run there is at step {first}, past the {steps} steps asked for; ask for more, "
                "or use another --workdir"
            )
        if self.teachers is not None and first < steps:
            self.teachers.check(jit_compile=self.options.flags.jit_compile)
        if first:
            print(f"continuing at step {first} of {count_text(steps)}", flush=True)
            previous, peak = previous_schedule(self.workdir, needed=False), self.options.recipe.learning_rate
            if previous and (
                line := describe_change(previous, self.options.schedule, step=first, learning_rate=peak)
            ):
                print(line, flush=True)
        return first

    def _callback(self, first: int) -> RunCallback:
        flags = self.options.flags
        callback = RunCallback(
            length=self.options.length,
            step=first,
            log=MetricsLog(self.workdir, step=first, writes=self.workers.chief),
            log_every=flags.log_every,
            checkpoints=self.checkpoints,
            checkpoint_every=flags.checkpoint_every,
            preemption=self.preemption,
            workers=self.workers,
            evaluator=self._evaluator if self.workers.chief else None,
            learning_rate=lambda step: float(self.learning_rate(step)),
        )
        callback.set_model(self.distiller)
        return callback

    def _appending(self) -> Appending | None:
        if self.teacher_pass is None:
            return None
        return Appending(
            cast(StoreReader, self.store.stores[0]),
            self.teacher_pass,
            batch_size=self.options.length.batch_size,
            views_per_shard=self.options.flags.views_per_shard,
            preemption=self.preemption,
        )

    def _fit(self, first: int, callbacks: list[tf.keras.callbacks.Callback]) -> None:
        """Trains from step `first` to the end; with --follow, in parts as views are published. The last callback is the run's."""
        callback: RunCallback = callbacks[-1]
        steps = self.options.length.steps
        done: int | float = first
        while done < steps:
            stop = steps if self.following is None else self.following.wait(int(done), pause=callback.pause)
            callback.resume()
            callback.pauses_at = None if stop == steps or stop % self.options.eval_every == 0 else int(stop)
            self._fit_until(int(done), stop, callbacks)
            done = stop

    def _fit_until(self, first: int, stop: int | float, callbacks: list[tf.keras.callbacks.Callback]) -> None:
        """Calls `fit` for each segment of the steps `first .. stop - 1`."""
        callback: RunCallback = callbacks[-1]
        online_from = self.options.length.online_from
        for segment in segments(first, stop, interval=self.options.eval_every, online_from=online_from):
            callback.source = "online" if segment.online else "replay"
            batches = self._batches(segment)
            done = callback.step
            try:
                with self.workers.watch():
                    self.distiller.fit(
                        batches,
                        epochs=segment.intervals,
                        steps_per_epoch=segment.interval,
                        callbacks=callbacks,
                        verbose=0,
                    )
            except tf.errors.OpError as error:
                raise self._explain(error, callback.step) from error
            except DivergedError as error:
                raise self.explain_divergence(done, callback.step) or error from error

    def _batches(self, segment: Segment) -> tf.data.Dataset:
        """Batches of a segment; under a strategy, each replica reads its own part of a step's views."""
        if self.strategy is tf.distribute.get_strategy():
            return self.targets.batches(segment.start, segment.stop)
        return self.strategy.distribute_datasets_from_function(
            lambda context: self.targets.batches(segment.start, segment.stop, context=context)
        )

    def _explain(self, error: Exception, step: int) -> Exception:
        """The cause of an error of TensorFlow's that ended `fit` after `step` steps."""
        batch_size, execution = self.options.length.batch_size, self.options.flags.steps_per_execution
        stop = int(min(step + execution + PREFETCHED, self.options.length.steps))
        first = step * batch_size
        return explain(
            error, self.targets.input, first=first, stop=stop * batch_size, remedy=self.memory_remedy()
        )

    def memory_remedy(self) -> str:
        """What to change when a step runs out of memory, for the error message."""
        remedy = f"lower --batch_size ({self.options.length.batch_size} views per step)"
        if (execution := self.options.flags.steps_per_execution) > 1:
            remedy += f" or --steps_per_execution ({execution})"
        for member in () if self.teachers is None else self.teachers.members:
            remedy += (
                f"; the online teacher runs on {member.batched.batch_size} views at a time, the store's "
                "--teacher_batch_size; training on stored views alone needs no teacher"
            )
        return remedy

    def explain_divergence(self, first: int, last: int) -> DataError | None:
        """The teacher output that made the loss of a step in `first .. last - 1` infinite; None if the teacher did not."""
        if self.teachers is None:
            return None
        flags = self.options.flags
        # All figures were finite at the last logged step, which was the last step of an execution.
        logged = last - flags.log_every - (flags.steps_per_execution - 1)
        first = max(first, logged, self.options.length.online_from)
        return self.teachers.find_unfit_logits(self.targets.batches(first, last))

    def check_workers(self, *, finished: bool) -> None:
        """Compares what the workers found in --workdir. Collective."""
        state = {"latest step in --workdir": self.checkpoints.latest_step(), "finished": finished}
        self.workers.check_same(state, remedy=SAME_WORKERS)

    def finished_result(self) -> dict[str, Any] | None:
        """Content of result.json if the run has completed every step asked for and all files are there; otherwise None.

        None as well if the store has teacher outputs for other evaluation splits by now, or if another --eval_split is asked
        for: `finish` then evaluates again, without training.
        """
        options = self.options
        if self.checkpoints.latest_step() != options.length.steps:
            return None
        result = previous_result(self.workdir, steps=options.length.steps)
        if result is None or result.get("eval_split") != options.eval_split:
            return None
        names = [STUDENT_DIRECTORY] + [BEST_DIRECTORY] * (result.get("best") is not None)
        names += [PREDICTIONS_FILE] * (options.eval_split is not None)
        complete = all((self.workdir / name).exists() for name in names)
        if not complete or list(result["evaluation"]) != self.store.held_out_splits:
            return None
        print("nothing to do: the run is finished", flush=True)
        return result

    def finish(self, training: dict[str, Any]) -> dict[str, Any]:
        """Evaluates on every held-out split of the store, exports the student, and writes result.json.

        Returns:
          The content of result.json; `training` on workers other than the chief, which do nothing.
        """
        if not self.workers.chief:
            return training
        store, options = self.store, self.options
        evaluations = {
            name: self.evaluated.get(name) or self.evaluator(name).evaluate(self.student)
            for name in store.held_out_splits
        }
        if (evaluator := self._evaluator) is not None:
            if evaluator.predictions is None:  # an earlier process evaluated the last step
                evaluator.evaluate(self.student)
            evaluator.write_predictions(self.workdir / PREDICTIONS_FILE)
        export_student(self.student, self.workdir / STUDENT_DIRECTORY)
        best = self._export_best()
        if training["first_step"] == training["steps"]:  # nothing was trained: keep what was measured then
            previous = previous_result(self.workdir, steps=options.length.steps) or {}
            training |= {name: previous[name] for name in OF_TRAINING if name in previous}
        result = {
            **training,
            **store.identity(),
            "student": options.recipe.student,
            **({"fingerprints": options.fingerprints} if options.fingerprints else {}),
            "parameters": self.student.count_params(),
            "epochs": options.length.epochs,
            "store_bytes": store.view_bytes,
            "evaluation": evaluations,
            **({} if evaluations else {"not_evaluated": NOT_EVALUATED}),
            "no_accuracy": match_classes(self.dataset, store.spec.num_classes, store.classes).no_accuracy,
            "eval_split": options.eval_split,
            "best": best,
        }
        write_json(self.workdir / RESULT_FILE, result)
        return result

    def _export_best(self) -> dict[str, Any] | None:
        """Exports the student of the best checkpoint; returns its step and evaluation, None if there is none."""
        path, found = self.workdir / BEST_DIRECTORY, self.checkpoints.best()
        if found is None:
            remove_directory(path)
            return None
        step, evaluation = found
        if step == self.options.length.steps:  # the same weights, so the same files
            with atomic_directory(path, replace=True) as fresh:
                shutil.copytree(self.workdir / STUDENT_DIRECTORY, fresh)
        else:
            self.checkpoints.restore_best(self.student)
            export_student(self.student, path)
            self.checkpoints.restore()
        return {"step": step, **evaluation}

    def export_saved(self) -> None:
        """Exports the student of the latest checkpoint, if there is one. Only the chief does."""
        if self.workers.chief and (step := self.checkpoints.restore()):
            path = export_student(self.student, self.workdir / STUDENT_DIRECTORY)
            print(f"student: {path}; --steps={step} finishes the run as it is", flush=True)
