"""Builds a run from options: loads the teacher, makes student, optimizer, input and checkpoints."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import tensorflow as tf

from pipeline.errors import UserError
from pipeline.inputs.dataset import Dataset
from pipeline.inputs.locate import (
    check_teacher_exists,
    find_teacher,
    load_teacher,
    open_dataset,
    select_split,
)
from pipeline.store.view_store import ViewStore
from trainer import models
from trainer.config.choices import student_kind
from trainer.config.run_length import replica_batch_size
from trainer.distribution.workers import Workers
from trainer.flags.shared import spelled
from trainer.models.batch_norm import averaged_statistics, replicas_notice, synchronize
from trainer.models.initial_weights import load_initial_weights
from trainer.run.checkpoints import Checkpoints
from trainer.run.evaluation import Evaluator
from trainer.run.following import Following
from trainer.run.options import TrainOptions
from trainer.run.preemption import Preemption
from trainer.run.results import check_export
from trainer.run.training import Run
from trainer.run.write_back import TeacherPass
from trainer.step.distiller import Distiller
from trainer.step.loss_scaling import scale_loss
from trainer.step.optimizers import recipe_optimizer
from trainer.step.schedules import Scaled
from trainer.targets.batches import Targets
from trainer.targets.online_teacher import OnlineTeacher, OnlineTeachers


def build_run(
    options: TrainOptions,
    store: ViewStore,
    *,
    dataset: Dataset | None = None,
    strategy: tf.distribute.Strategy | None = None,
    preemption: Preemption | None = None,
) -> Run:
    """Builds a run with a freshly initialized student.

    Raises:
      UserError: data set or teacher are missing, or the batch size does not fit the replicas.
      DataError: data set or teacher are not those of the store.
    """
    flags = options.flags
    strategy = strategy or tf.distribute.get_strategy()
    replicas = int(strategy.num_replicas_in_sync)
    if flags.write_back and replicas > 1:
        raise UserError(
            f"--write_back: got {replicas} replicas; records are appended in the order of views, which takes a single "
            "replica: omit --strategy, or precompute the epochs"
        )
    size = replica_batch_size(options.recipe.batch_size, replicas)
    workers = Workers(strategy)
    # First, because mistakes in a student of the user are likely, and the rest takes long.
    with strategy.scope(), averaged_statistics():
        student = _make_student(options, store, replicas=replicas)
    if flags.init is not None:
        print(f"--init={flags.init}: {load_initial_weights(student, flags.init)}", flush=True)
    if workers.chief and student_kind(options.recipe.student) in ("function", "path"):
        check_export(student, Path(flags.workdir), name=options.recipe.student)
    if dataset is None:
        dataset = open_dataset(
            store, "views", data_dir=flags.data_dir, data_cache_bytes=flags.data_cache_bytes
        )
    teachers = _load_teachers(options, store, size)
    learning_rate = Scaled(options.recipe.learning_rate, options.schedule.multiplier())
    with strategy.scope(), averaged_statistics():
        distiller = _make_distiller(student, options, teachers=teachers)
    targets = _make_targets(options, store, dataset, live=teachers is not None, replicas=replicas)
    teacher_pass = None
    if teachers is not None and flags.write_back:
        teacher_input = targets.teacher_input(store.spec.teacher.batch_size)
        teacher_pass = TeacherPass(teacher_input, teachers.members[0].teacher)
    following = None
    if flags.follow:
        following = Following(
            store,
            length=options.length,
            steps_per_execution=flags.steps_per_execution,
            interval=options.eval_every,
            workers=workers,
        )
    return Run(
        options=options,
        store=store,
        dataset=dataset,
        distiller=distiller,
        learning_rate=learning_rate,
        targets=targets,
        teachers=teachers,
        teacher_pass=teacher_pass,
        checkpoints=Checkpoints(
            Path(flags.workdir) / "checkpoints",
            student=distiller.student,
            optimizer=distiller.optimizer,
            skipped=distiller.skipped,
            identity=options.identity(store.identity()),
            writes=workers.chief,
        ),
        evaluator=functools.partial(_make_evaluator, options, store, dataset),
        following=following,
        strategy=strategy,
        workers=workers,
        preemption=preemption or Preemption(),
    )


def _make_targets(
    options: TrainOptions, store: ViewStore, dataset: Dataset, *, live: bool, replicas: int
) -> Targets:
    """The input of the run; `live`: whether an online teacher continues the store."""
    flags, arm = options.flags, options.arm
    return Targets(
        store,
        dataset,
        arm,
        batch_size=options.recipe.batch_size,
        replicas=replicas,
        image_cache_bytes=flags.image_cache_bytes,
        buffer_bytes=flags.input_buffer_bytes,
        continued_from=store.views.num_records if live and not arm.live else None,
        with_record=flags.write_back,
    )


def _load_teachers(options: TrainOptions, store: ViewStore, size: int) -> OnlineTeachers | None:
    """The online teachers for `size` views per replica; None if every step trains on stored logits."""
    given = options.flags.teacher
    if given is None and not options.arm.live:
        return None
    if options.length.online_from == options.length.steps:
        for path in given or []:
            check_teacher_exists(path)
        print(f"{spelled('teacher', given)} is not needed: the store has all views of this run", flush=True)
        return None
    members = []
    for part, path in itertools.zip_longest(store.stores, given or []):
        found = find_teacher(part.spec, path, store=part.location)
        teacher = load_teacher(part.spec, found)
        members.append(OnlineTeacher(teacher, found, part.spec))
        batched = members[-1].batched
        if padding := batched.padding(size):
            print(
                f"the teacher runs on {batched.batch_size} views at a time, as in the precompute: {size} views per replica take "
                f"{padding} rows of padding; a multiple of {batched.batch_size} takes none",
                flush=True,
            )
    return OnlineTeachers(tuple(members), tuple(store.weights))


def _make_student(options: TrainOptions, store: ViewStore, *, replicas: int) -> tf.keras.Model:
    """The student, with fresh or its own weights; to be called in the strategy's scope."""
    flags, recipe, spec = options.flags, options.recipe, store.spec
    tf.keras.utils.set_random_seed(flags.seed)
    student = models.build_student(
        recipe.student,
        num_classes=spec.num_classes,
        image_size=store.image_size,
        precision=flags.precision,
    )
    if flags.sync_batch_norm:
        student = synchronize(student)
    if notice := replicas_notice(student, batch_size=recipe.batch_size, replicas=replicas):
        print(notice, flush=True)
    return student


def _make_distiller(
    student: tf.keras.Model, options: TrainOptions, *, teachers: OnlineTeachers | None
) -> Distiller:
    """Student, loss and optimizer, compiled; to be called in the strategy's scope."""
    flags, recipe = options.flags, options.recipe
    distiller = Distiller(
        student,
        temperature=options.temperature,
        temperature_squared=recipe.temperature_squared,
        teacher=teachers,
        round_trip=None if teachers is None else teachers.round_trip,
    )
    optimizer = recipe_optimizer(recipe, options.schedule.multiplier())
    if flags.precision == "float16":
        optimizer = scale_loss(optimizer)
    distiller.compile(
        optimizer=optimizer, steps_per_execution=flags.steps_per_execution, jit_compile=flags.jit_compile
    )
    return distiller


def _make_evaluator(options: TrainOptions, store: ViewStore, dataset: Dataset, split: str) -> Evaluator:
    return Evaluator(
        store,
        select_split(store, split, dataset),
        batch_size=options.flags.eval_batch_size,
        temperature=options.temperature,
        temperature_squared=options.recipe.temperature_squared,
        cache_bytes=options.flags.image_cache_bytes,
        buffer_bytes=options.flags.input_buffer_bytes,
    )
