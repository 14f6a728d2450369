"""The outer loop of a training run: builds the student and its input, trains, checkpoints, evaluates."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import tensorflow as tf

from pipeline.errors import UserError
from pipeline.inputs.locate import (
    check_teacher_exists,
    find_teacher,
    load_teacher,
    open_dataset,
    select_split,
)
from pipeline.inputs.teacher import Teacher
from pipeline.storage.files import write_json
from pipeline.store.reader import Store
from trainer import models
from trainer.config.run_files import CONFIG_FILE
from trainer.config.run_length import Segment, count_text, cut_segments
from trainer.distribution.strategy import replica_batch_size
from trainer.distribution.workers import SAME_WORKERS, Workers
from trainer.models.batch_norm import averaged_statistics, replicas_notice, synchronize
from trainer.run.begun import begun_schedule, describe_change
from trainer.run.callbacks import DivergedError, MetricsLog, RunCallback
from trainer.run.checkpoints import Checkpoints
from trainer.run.evaluation import Evaluator
from trainer.run.failures import explain, explain_divergence
from trainer.run.following import Following
from trainer.run.options import TrainOptions
from trainer.run.preemption import Preemption
from trainer.run.results import STUDENT_DIRECTORY, export_student
from trainer.run.write_back import Appending, TeacherPass
from trainer.step.distiller import Distiller
from trainer.step.optimizers import make_optimizer
from trainer.step.schedules import Scaled
from trainer.targets.batches import Targets
from trainer.targets.online_teacher import BatchedTeacher, try_teacher


class Run:
    """One training run: the model, its input, and its directory.

    Args:
      options: resolved flags.
      store: to train on.
      strategy: of its replicas; one by default.
      preemption: says when to save and stop.

    Attributes:
      evaluated: figures of the student as it is after `train`, by split, as far as there are any.
    """

    def __init__(
        self,
        options: TrainOptions,
        store: Store,
        *,
        strategy: tf.distribute.Strategy | None = None,
        preemption: Preemption | None = None,
    ) -> None:
        self._preemption = preemption or Preemption()
        flags, recipe = options.flags, options.recipe
        self.options, self.store = options, store
        self.evaluated: dict[str, dict[str, Any]] = {}
        self.workdir = Path(flags["workdir"])
        self.dataset = open_dataset(
            store, "views", data_dir=flags["data_dir"], data_cache_bytes=flags["data_cache_bytes"]
        )
        self.teacher = self._load_teacher()
        self.strategy = strategy or tf.distribute.get_strategy()
        self.replicas = int(self.strategy.num_replicas_in_sync)
        self.workers = Workers(self.strategy)
        self.online_teacher = self._online_teacher()
        with self.strategy.scope(), averaged_statistics():
            self._build()
        past_the_store = self.teacher is not None and not options.arm.live
        self.targets = Targets(
            store,
            self.dataset,
            options.arm,
            batch_size=recipe.batch_size,
            replicas=self.replicas,
            image_cache_bytes=flags["image_cache_bytes"],
            buffer_bytes=flags["input_buffer_bytes"],
            continued_from=store.views.num_records if past_the_store else None,
            with_record=flags["write_back"],
        )
        if flags["write_back"] and self.replicas > 1:
            raise UserError(
                f"--write_back: with {self.replicas} replicas; it takes a step's logits in the order of its views, "
                "which one replica gives: leave --strategy out, or precompute the epochs"
            )
        self.following = (
            Following(
                store,
                length=options.length,
                steps_per_execution=flags["steps_per_execution"],
                interval=options.eval_every,
                workers=self.workers,
            )
            if flags["follow"]
            else None
        )
        self.checkpoints = Checkpoints(
            self.workdir / "checkpoints",
            student=self.student,
            optimizer=self.optimizer,
            identity=options.identity(store.spec.digest()),
            writes=self.workers.chief,
        )

    def _build(self) -> None:
        """Student, optimizer and distiller, in the strategy's scope."""
        options, store, recipe = self.options, self.store, self.options.recipe
        # Here, for a teacher that was loaded before may have drawn from the generators: same seed, same student.
        tf.keras.utils.set_random_seed(options.flags["seed"])
        self.student = models.build_student(
            recipe.student,
            num_classes=store.spec.num_classes,
            image_size=store.spec.policy.image_size,
            precision=options.flags["precision"],
        )
        if options.flags["sync_batch_norm"]:
            self.student = synchronize(self.student)
        elif notice := replicas_notice(self.student, batch_size=recipe.batch_size, replicas=self.replicas):
            print(notice, flush=True)
        schedule = options.schedule.multiplier()
        self.learning_rate = Scaled(recipe.learning_rate, schedule)
        self.optimizer = make_optimizer(
            recipe.learning_rate,
            schedule=schedule,
            weight_decay=recipe.weight_decay,
            decay_mode=recipe.decay_mode,
            decay_kernels_only=recipe.decay_kernels_only,
            clip=recipe.clip,
            clip_norm=recipe.clip_norm,
            epsilon=recipe.epsilon,
        )
        self.distiller = Distiller(
            self.student,
            temperature=options.temperature,
            temperature_squared=recipe.temperature_squared,
            teacher=self.online_teacher,
            round_trip=store.spec.make_codec().round_trip,
        )
        self.distiller.compile(
            optimizer=self.optimizer,
            steps_per_execution=options.flags["steps_per_execution"],
            jit_compile=options.flags["jit_compile"],
        )

    def _load_teacher(self) -> Teacher | None:
        path = self.options.flags["teacher"]
        if self.options.arm.live:
            path = find_teacher(self.store.spec, path, store=self.store.location)
        if path is None:
            return None
        if self.options.length.online_from == self.options.length.steps:
            check_teacher_exists(path)
            print(f"--teacher={path} is not needed: the store holds every view of this run", flush=True)
            return None
        return load_teacher(self.store.spec, path)

    def _online_teacher(self) -> BatchedTeacher | None:
        """The teacher in the precompute's batches."""
        if self.teacher is None:
            return None
        teacher = BatchedTeacher(self.teacher, self.store.spec.teacher.batch_size)
        size = replica_batch_size(self.options.recipe.batch_size, self.replicas)
        if padding := teacher.padding(size):
            print(
                f"the teacher runs in batches of {teacher.batch_size}, as the store's did: {padding} rows of padding to "
                f"{size} views; a multiple of {teacher.batch_size} needs none",
                flush=True,
            )
        return teacher

    def evaluator(self, split: str) -> Evaluator:
        """The evaluator of a split that the store has the teacher's logits of."""
        return Evaluator(
            self.store,
            select_split(self.store, split, self.dataset),
            batch_size=self.options.flags["eval_batch_size"],
            temperature=self.options.temperature,
            temperature_squared=self.options.recipe.temperature_squared,
            cache_bytes=self.options.flags["image_cache_bytes"],
            buffer_bytes=self.options.flags["input_buffer_bytes"],
        )

    def train(self) -> dict[str, Any]:
        """Trains from the latest checkpoint to the end; returns what result.json says of the training."""
        length = self.options.length
        first = self.checkpoints.restore()
        if self.workers.chief:
            self.checkpoints.remove_leftovers()
        if first > length.steps:
            raise UserError(
                f"--workdir={self.workdir}: the run there is at step {first}, past the {length.steps} asked for; ask for "
                "more, or use another --workdir"
            )
        if self.teacher is not None and self.online_teacher is not None and first < length.steps:
            try_teacher(
                self.online_teacher,
                self.store.spec,
                path=str(self.teacher.path),
                jit_compile=self.options.flags["jit_compile"],
            )
        if first:
            print(f"continuing at step {first} of {count_text(length.steps)}", flush=True)
            self._print_change(first)
        # Not before: of a run that is refused here, the directory keeps what was asked of it first.
        if self.workers.chief:
            write_json(self.workdir / CONFIG_FILE, self.options.to_json())
        split = self.options.eval_split
        callback = RunCallback(
            length=length,
            step=first,
            log=MetricsLog(self.workdir, step=first, writes=self.workers.chief),
            log_every=self.options.flags["log_every"],
            checkpoints=self.checkpoints,
            checkpoint_every=self.options.flags["checkpoint_every"],
            preemption=self._preemption,
            workers=self.workers,
            evaluator=self.evaluator(split) if split is not None and self.workers.chief else None,
            learning_rate=lambda step: float(self.learning_rate.numpy(step)),
        )
        callback.set_model(self.distiller)
        begun = time.monotonic()
        appending = self._appending()
        try:
            if first and (
                first % self.options.eval_every == 0 or first in (length.online_from, length.steps)
            ):
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
        if split is not None and callback.last is not None:
            self.evaluated = {split: callback.last}
        return {
            "steps": length.steps,
            "first_step": first,
            "seconds": time.monotonic() - begun,
            "seconds_a_step": {name: timing.seconds_a_step for name, timing in callback.timings.items()},
            "epochs_written_back": 0 if appending is None else appending.epochs,
            "teacher_forward_passes": (length.steps - max(length.online_from, first)) * length.batch_size,
        }

    def _print_change(self, step: int) -> None:
        """Prints what happens to the schedule of a run that goes on after `step` steps."""
        begun, now = begun_schedule(self.workdir, needed=False), self.options.schedule
        peak = self.options.recipe.learning_rate
        if begun and (line := describe_change(begun, now, step=step, learning_rate=peak)):
            print(line, flush=True)

    def _appending(self) -> Appending | None:
        """With `--write_back`, the store's writer."""
        if self.teacher is None or not self.options.flags["write_back"]:
            return None
        size = self.store.spec.teacher.batch_size
        teacher_pass = TeacherPass(dataclasses.replace(self.targets.input, batch_size=size), self.teacher)
        return Appending(
            self.store,
            teacher_pass,
            batch_size=self.options.length.batch_size,
            views_per_shard=self.options.flags["views_per_shard"],
            preemption=self._preemption,
        )

    def _fit(self, first: int, callbacks: list[tf.keras.callbacks.Callback]) -> None:
        """Trains from step `first` to the end, with `--follow` as far as views are published; the run's own callback last."""
        callback: RunCallback = callbacks[-1]
        steps = self.options.length.steps
        done: int | float = first
        while done < steps:
            stop = steps if self.following is None else self.following.wait(int(done), pause=callback.pause)
            callback.go_on()
            callback.pauses_at = None if stop == steps or stop % self.options.eval_every == 0 else int(stop)
            self._fit_until(int(done), stop, callbacks)
            done = stop

    def _fit_until(self, first: int, stop: int | float, callbacks: list[tf.keras.callbacks.Callback]) -> None:
        """Calls `fit` for each segment of the steps `first .. stop - 1`."""
        callback: RunCallback = callbacks[-1]
        length = self.options.length
        for segment in cut_segments(
            first, stop, interval=self.options.eval_every, online_from=length.online_from
        ):
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
                raise explain(self, error, callback.step) from error
            except DivergedError as error:
                raise explain_divergence(self, done, callback.step) or error from error

    def _batches(self, segment: Segment) -> tf.data.Dataset:
        """The input of a segment; under a strategy each replica takes its own part of a step's views."""
        if self.strategy is tf.distribute.get_strategy():
            return self.targets.batches(segment.start, segment.stop)
        return self.strategy.distribute_datasets_from_function(
            lambda context: self.targets.batches(segment.start, segment.stop, context=context)
        )

    def check_workers(self, *, finished: bool) -> None:
        """Compares the checkpoints that all workers see. Collective.

        Raises:
          UserError: they differ.
        """
        state = {"latest step in --workdir": self.checkpoints.latest_step(), "finished": finished}
        self.workers.check_same(state, remedy=SAME_WORKERS)

    def export_saved(self) -> None:
        """Exports the student of the latest checkpoint, if there is one; of several workers, the chief does."""
        if self.workers.chief and (step := self.checkpoints.restore()):
            path = export_student(self.student, self.workdir / STUDENT_DIRECTORY)
            print(f"student: {path}; --steps={step} finishes the run as it is", flush=True)
