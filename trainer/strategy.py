"""Replicas: which strategy, and which views each replica takes.

Step `t` trains on views `[t * B, (t + 1) * B)` whatever the number of replicas: replica `r` of `R` takes
`[t * B + r * b, t * B + (r + 1) * b)` with `b = B / R`, and its own `b + 2` crops. A plain data set would be split
by leading dimension, which breaks the partners' indices.
"""

from __future__ import annotations

import json
import os
from typing import Any

import tensorflow as tf

from pipeline.errors import UserError

STRATEGIES = ("default", "mirrored", "multiworker", "tpu")


def make_strategy(name: str, *, replicas: int | None = None, tpu: str = "local") -> tf.distribute.Strategy:
    """The strategy of a run; must be called before TensorFlow has used a device.

    Args:
      name: one of `STRATEGIES`. `mirrored` takes all GPUs, or `replicas` logical CPU devices where there are none;
        `multiworker` takes its peers from TF_CONFIG.
      replicas: of `mirrored` on CPU.
      tpu: the TPU's name, or `local` on a TPU VM.

    Raises:
      UserError: there is no such strategy, or what it needs is not there.
    """
    if replicas is not None and name != "mirrored":
        raise UserError(f"--replicas={replicas}: only --strategy=mirrored takes it, got --strategy={name}")
    if name == "default":
        return tf.distribute.get_strategy()
    if name == "mirrored":
        return _mirrored(replicas)
    if name == "multiworker":
        return _multiworker()
    if name == "tpu":
        return _tpu(tpu)
    raise UserError(f"--strategy={name}: expected one of {', '.join(STRATEGIES)}")


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


def _multiworker() -> tf.distribute.Strategy:
    text = os.environ.get("TF_CONFIG", "")
    try:
        config: dict[str, Any] = json.loads(text)
        workers, task = config["cluster"]["worker"], config["task"]
        valid = task["type"] == "worker" and 0 <= int(task["index"]) < len(workers)
    except (ValueError, KeyError, TypeError):
        valid = False
    if not valid:
        raise UserError(
            "--strategy=multiworker: TF_CONFIG has to name the workers and this one, such as "
            '{"cluster": {"worker": ["HOST1:PORT", "HOST2:PORT"]}, "task": {"type": "worker", "index": 0}}; '
            f"got {text or 'nothing'}"
        )
    return tf.distribute.MultiWorkerMirroredStrategy()


def _tpu(name: str) -> tf.distribute.Strategy:
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=name)
        tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
    except (ValueError, KeyError, OSError, RuntimeError, tf.errors.OpError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"--strategy=tpu --tpu={name}: no TPU there ({reason}); on a TPU VM use --tpu=local"
        ) from error
    return tf.distribute.TPUStrategy(resolver)


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
    return indices.map(
        lambda k: (k // local) * batch_size + (pipeline * local + k % local) * size,
        num_parallel_calls=1,
        deterministic=True,
    )
