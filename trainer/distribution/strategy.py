"""Replicas: which strategy, and which views each replica takes.

Step `t` trains on views `[t * B, (t + 1) * B)` whatever the number of replicas: replica `r` of `R` takes
`[t * B + r * b, t * B + (r + 1) * b)` with `b = B / R`, and its own `b + 2` crops. A plain data set would be split
by leading dimension, which breaks the partners' indices.
"""

from __future__ import annotations

import tensorflow as tf

from pipeline.errors import UserError
from trainer.config.choices import check_strategy
from trainer.distribution import tpu as tpus
from trainer.distribution import workers


def make_strategy(
    name: str, *, replicas: int | None = None, tpu: str | None = None
) -> tf.distribute.Strategy:
    """The strategy of a run; must be called before TensorFlow has used a device.

    Args:
      name: one of `trainer.config.choices.STRATEGIES`. `mirrored` takes all GPUs, or `replicas` logical CPU devices where there are none;
        `multiworker` all GPUs of each process that TF_CONFIG names, or its CPU; `tpu` all cores of a TPU.
      replicas: of `mirrored`.
      tpu: of `tpu`: its name, or `local`.

    Raises:
      UserError: there is no such strategy, or what it needs is not there.
    """
    check_strategy(name, replicas=replicas, tpu=tpu)
    if name == "mirrored":
        return _mirrored(replicas)
    if name == "multiworker":
        return workers.connect()
    return tpus.connect(tpu) if name == "tpu" else tf.distribute.get_strategy()


def _mirrored(replicas: int | None) -> tf.distribute.Strategy:
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        if replicas is not None and replicas > len(gpus):
            raise UserError(f"--replicas={replicas}: this machine has {len(gpus)} GPUs")
        return tf.distribute.MirroredStrategy([f"GPU:{i}" for i in range(replicas or len(gpus))])
    count = replicas or 1
    cpu = tf.config.list_physical_devices("CPU")[0]
    try:
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * count)
    except RuntimeError as error:
        if len(tf.config.list_logical_devices("CPU")) < count:
            raise UserError(
                f"--replicas={replicas}: TensorFlow has already started with fewer devices"
            ) from error
    return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(count)])


def replica_batch_size(batch_size: int, replicas: int) -> int:
    """b = B / R.

    Raises:
      UserError: it is not a whole number.
    """
    if batch_size % replicas:
        raise UserError(
            f"--batch_size={batch_size}: not a multiple of the {replicas} replicas; step t has to train on the same "
            "views with any number of them"
        )
    return batch_size // replicas


def replica_starts(
    start: int, stop: int, *, batch_size: int, replicas: int, pipeline: int = 0, pipelines: int = 1
) -> tf.data.Dataset:
    """First views of the batches that one input pipeline feeds, in the order in which its replicas take them.

    Args:
      start, stop: steps.
      batch_size: B.
      replicas: R over all hosts.
      pipeline: number of this host's input pipeline.
      pipelines: how many there are; each feeds R / pipelines replicas.

    Returns:
      int64 [] elements: for each step, for each replica of this pipeline, its first view.
    """
    local = replicas // pipelines
    size = batch_size // replicas
    indices = tf.data.Dataset.range(start * local, stop * local)
    return indices.map(lambda k: (k // local) * batch_size + (pipeline * local + k % local) * size)


_DIGIT = 20  # bits; float32 is exact up to 24
_DIGITS = 3  # view indices are below `trainer.config.run_length.MAX_VIEWS`, 2^60


def gather_views(views: tf.Tensor, context: tf.distribute.ReplicaContext) -> tf.Tensor:
    """The views of all replicas, in a step of several.

    As a sum, of float32 numbers that are exact: every backend can add those up over replicas, like gradients,
    but not every one int64, or gather.

    Args:
      views: int64 [b], this replica's.
      context: this replica.

    Returns:
      int64 [R * b], in the order of the replicas, on each of them.
    """
    replicas = context.num_replicas_in_sync
    shifts = tf.range(_DIGITS, dtype=tf.int64) * _DIGIT
    digits = tf.bitwise.right_shift(views[:, tf.newaxis], shifts) & (2**_DIGIT - 1)  # [b, digits]
    row = tf.one_hot(context.replica_id_in_sync_group, replicas)  # [R]
    placed = row[:, tf.newaxis, tf.newaxis] * tf.cast(digits, tf.float32)  # [R, b, digits]
    everywhere = tf.cast(context.all_reduce("sum", placed), tf.int64)
    return tf.reshape(tf.reduce_sum(tf.bitwise.left_shift(everywhere, shifts), axis=-1), [-1])
