"""A saved student that is evaluated: any SavedModel or `.keras` file of images that returns logits, loaded as a teacher is."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import tensorflow as tf

from pipeline.errors import UserError
from pipeline.inputs.dataset import Dataset
from pipeline.inputs.teacher import Teacher
from pipeline.inputs.teacher_checks import check_logits, trial_crops
from pipeline.store.combination import combine
from pipeline.store.view_store import ViewStore

_TRIAL_IMAGES = 8


def load_student(flags: argparse.Namespace, *, image_size: int) -> Teacher:
    """Loads a student and tries it on a few pictures.

    Args:
      flags: those of `trainer.evaluate`.
      image_size: side of the images if neither --image_size nor the model fixes it.

    Raises:
      UserError: it cannot be loaded, takes other images, or does not return logits; or an output depends on the other images of a
        batch or on chance.
      DataError: an output is not finite.
    """
    student = Teacher(
        flags.student,
        image_size=image_size,
        own_size=flags.image_size is None,
        value_range=flags.student_value_range,
        signature=flags.student_signature,
        output=flags.student_output,
        batch_size=flags.eval_batch_size,
        parameter="student",
        batch_parameter="eval_batch_size",
    )
    crops = trial_crops(student.fixed_batch_size or _TRIAL_IMAGES, student.image_size)
    whole = tf.constant(crops), tf.range(len(crops)), tf.ones(len(crops))
    logits = student.logits(*whole, name_row="trial image {}".format)
    student.check_rows(crops)
    check_logits(logits, what=student.what, assume_logits=flags.assume_logits)
    return student


def as_keras(student: Teacher) -> Callable[..., tf.Tensor]:
    """A function that is called like a Keras model. A saved model is in inference mode anyway."""

    def call(views: tf.Tensor, training: bool) -> tf.Tensor:
        del training
        return student(views)

    return call


def fit_to_student(store: ViewStore, student: Teacher) -> ViewStore:
    """The store at the image size of a student.

    Raises:
      UserError: the store has other classes, or its views have another size only.
    """
    if student.num_classes != store.spec.num_classes:
        raise UserError(
            f"{student.what}: has {student.num_classes:,} classes, but {store.location} has logits of {store.spec.num_classes:,}; "
            "evaluate it on a store of its teacher, or on --dataset"
        )
    if student.image_size == store.image_size:
        return store
    policy = store.spec.policy
    if not policy.any_size:
        raise UserError(
            f"{student.what}: takes images of {student.image_size} pixels, but {store.location} has views of the policy {policy.name}, "
            f"which have one size, {store.image_size} pixels; evaluate it on --dataset={store.spec.dataset.name}"
        )
    return combine(store.stores, weights=store.weights, image_size=student.image_size)


def check_batches(student: Teacher, dataset: Dataset) -> None:
    """Refuses a model that takes larger batches than a split has images.

    Raises:
      UserError: it does.
    """
    fixed = student.fixed_batch_size
    if fixed is not None and fixed > dataset.num_examples:
        raise UserError(
            f"{student.what}: takes batches of exactly {fixed}, but {dataset.split} has {dataset.num_examples} images; export it with "
            "a batch dimension of None"
        )
