"""Distribution strategies, and the views of each replica.

Step `t` trains on views `[t * B, (t + 1) * B)` with any number of replicas: replica `r` of `R` takes
`[t * B + r * b, t * B + (r + 1) * b)` with `b = B / R`, and its own `b + 2` crops. Batches are not split along their leading
dimension, as TensorFlow would, because the indices of partners would no longer fit.
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
    """Makes a distribution strategy. Call it before TensorFlow uses a device.

    Args:
      name: one of `trainer.config.choices.STRATEGIES`. `mirrored`: all GPUs, or `replicas` logical CPU devices if there are
        none. `multiworker`: all GPUs of each process that TF_CONFIG lists, or its CPU. `tpu`: all cores of a TPU.

    Raises:
      UserError: the strategy or its devices do not exist.
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
            raise UserError(
                f"--replicas={replicas}: this machine has {len(gpus)} GPUs; use at most {len(gpus)}"
            )
        return tf.distribute.MirroredStrategy([f"GPU:{i}" for i in range(replicas or len(gpus))])
    count = replicas or 1
    cpu = tf.config.list_physical_devices("CPU")[0]
    try:
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * count)
    except RuntimeError as error:
        if len(tf.config.list_logical_devices("CPU")) < count:
            raise UserError(
                f"--replicas={replicas}: TensorFlow is already running with fewer devices; use a new process"
            ) from error
    return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(count)])


def replica_starts(
    start: int, stop: int, *, batch_size: int, replicas: int, pipeline: int = 0, pipelines: int = 1
) -> tf.data.Dataset:
    """First views of the batches of one input pipeline, in the order in which its replicas take them.

    Args:
      replicas: R on all hosts.
      pipelines: number of input pipelines; each feeds R / pipelines replicas.

    Returns:
      int64 [] elements: for each step and each replica of this pipeline, the replica's first view.
    """
    local = replicas // pipelines
    size = batch_size // replicas
    indices = tf.data.Dataset.range(start * local, stop * local)
    return indices.map(
        tf.autograph.experimental.do_not_convert(
            lambda k: (k // local) * batch_size + (pipeline * local + k % local) * size
        )
    )
