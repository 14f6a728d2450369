"""Batch normalization with several replicas: statistics over one replica's share of a batch, or over the whole step.

Keras's layer sees the `b = B / R` views of its replica, so that the step depends on the number of replicas. With
`synchronized=True` it sees all `B`, and the step does not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from pipeline.errors import UserError
from trainer.models.layers import leaf_layers, rebuild
from trainer.models.randomness import Generators


def _is_batch_norm(layer: tf.keras.layers.Layer) -> bool:
    return isinstance(layer, tf.keras.layers.BatchNormalization)


def _separate_batch_norms(student: tf.keras.Model) -> list[tf.keras.layers.Layer]:
    """Batch normalization of a model, nested models included, whose statistics cover one replica."""
    return [layer for layer in leaf_layers(student) if _is_batch_norm(layer) and not layer.synchronized]


def replicas_notice(student: tf.keras.Model, *, batch_size: int, replicas: int) -> str | None:
    """A notice that the steps of a run will depend on its number of replicas; None if they will not."""
    if replicas == 1:
        return None
    if _separate_batch_norms(student):
        return (
            f"{student.name} has batch normalization: with {replicas} replicas its statistics cover {batch_size // replicas} "
            f"views instead of the {batch_size} views of a step, so losses and weights depend on the number of replicas; "
            "--sync_batch_norm avoids this"
        )
    if len(Generators(student)):
        return (
            f"{student.name} has random layers, such as dropout: each of the {replicas} replicas draws its own numbers, so losses "
            "and weights depend on the number of replicas"
        )
    return None


def synchronize(student: tf.keras.Model) -> tf.keras.Model:
    """A copy of a student, weights included, whose batch normalization covers the views of all replicas.

    Args:
      student: Model of layers, created in the strategy's scope.

    Raises:
      UserError: it has no batch normalization, or some that cannot be changed.
    """
    if not _separate_batch_norms(student):
        raise UserError(
            f"--sync_batch_norm has no effect: {student.name} has no batch normalization, and its steps do not depend on "
            "the number of replicas; leave the flag out"
        )

    def change(layer: tf.keras.layers.Layer, config: dict[str, Any]) -> dict[str, Any]:
        return {**config, "synchronized": True} if _is_batch_norm(layer) else config

    synchronized = rebuild(student, change)
    if left := _separate_batch_norms(synchronized):
        raise UserError(
            f"--sync_batch_norm: {student.name} has batch normalization inside a layer of its own ({left[0].name}), which cannot be "
            "changed; create it with `synchronized=True`, and omit the flag"
        )
    return synchronized


@contextlib.contextmanager
def averaged_statistics() -> Iterator[None]:
    """Makes all variables created inside equal on all replicas of a strategy, moving statistics included.

    Keras requests moving statistics that differ between replicas until they are read. Evaluation, checkpoint and export
    would then be collective operations, and a chief that performs them alone would wait without end. Averaging each
    update instead yields the same statistics, which are linear in the updates, and makes reading them local.
    """

    def average_when_written(create: Callable[..., tf.Variable], **arguments: Any) -> tf.Variable:
        on_read, mean = tf.VariableSynchronization.ON_READ, tf.VariableAggregation.MEAN
        if arguments.get("synchronization") is on_read and arguments.get("aggregation") is mean:
            arguments["synchronization"] = tf.VariableSynchronization.ON_WRITE
        return create(**arguments)

    with tf.variable_creator_scope(average_when_written):
        yield
