"""Batch normalisation under several replicas: statistics of one replica's part of a batch, or of the whole step.

Keras's own layer sees the `b = B / R` views of its replica, so that the step depends on the number of replicas. Its
`synchronized` kind sees all `B`, and the step does not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from pipeline.errors import UserError


def _is_batch_norm(layer: tf.keras.layers.Layer) -> bool:
    return isinstance(layer, tf.keras.layers.BatchNormalization)


def replicas_notice(student: tf.keras.Model, *, batch_size: int, replicas: int) -> str | None:
    """The line to say before a run whose steps depend on the number of replicas, or None.

    Args:
      student: as it will be trained.
      batch_size: B, views a step.
      replicas: R.
    """
    if replicas == 1 or all(layer.synchronized for layer in student.layers if _is_batch_norm(layer)):
        return None
    return (
        f"{student.name} has batch normalisation: with {replicas} replicas its statistics are of "
        f"{batch_size // replicas} views, not of a step's {batch_size}, so that losses and weights depend on the number "
        "of replicas; with --sync_batch_norm they do not"
    )


def synchronise(student: tf.keras.Model) -> tf.keras.Model:
    """The same student, with the same weights, whose batch normalisation is over the views of all replicas.

    Args:
      student: a functional model; in the strategy's scope.

    Raises:
      UserError: it has no batch normalisation.
    """
    if not any(_is_batch_norm(layer) for layer in student.layers):
        raise UserError(
            f"--sync_batch_norm: {student.name} has no batch normalisation; leave the flag out, its step is the same "
            "with any number of replicas"
        )

    def clone(layer: tf.keras.layers.Layer) -> tf.keras.layers.Layer:
        config = layer.get_config()
        return type(layer).from_config({**config, "synchronized": True} if _is_batch_norm(layer) else config)

    synchronised = tf.keras.models.clone_model(student, clone_function=clone)
    synchronised.set_weights(student.get_weights())
    return synchronised


@contextlib.contextmanager
def averaged_statistics() -> Iterator[None]:
    """Variables made inside, in a strategy's scope, are the same on all replicas, moving statistics included.

    Keras asks for moving statistics that differ between replicas until they are read: evaluation, checkpoint and
    export would then be collective, and a chief that does them alone would wait for ever. Averaging each update
    instead gives the same statistics, since they are linear in the updates, and makes reading local.
    """

    def average_when_written(create: Callable[..., tf.Variable], **arguments: Any) -> tf.Variable:
        on_read, mean = tf.VariableSynchronization.ON_READ, tf.VariableAggregation.MEAN
        if arguments.get("synchronization") is on_read and arguments.get("aggregation") is mean:
            arguments["synchronization"] = tf.VariableSynchronization.ON_WRITE
        return create(**arguments)

    with tf.variable_creator_scope(average_when_written):
        yield
