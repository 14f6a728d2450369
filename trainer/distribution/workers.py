"""`--strategy=multiworker`: several processes, one per machine, that train one student together.

Every worker runs the same command and takes part in every step; MultiWorkerMirroredStrategy sums their gradients. One of them,
the chief, evaluates and writes; all of them read the same `--workdir`. Operations that only the chief runs must not be
collective, or the chief would wait endlessly for the others. All workers must run collective operations in the same order.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from pipeline.errors import TryAgainError, UserError
from pipeline.store.spec import differences
from trainer.config.choices import TF_CONFIG_EXAMPLE

# Errors of TensorFlow's collectives when another worker is gone, or has restarted.
_LOST = (
    tf.errors.UnavailableError,
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
    tf.errors.FailedPreconditionError,
)
# The same types are raised for other reasons, such as a file system that is unavailable.
_LOST_TEXT = re.compile(r"Collective ops is aborted|oordination|remote target /job|heartbeat")
_WORKER_TEXT = re.compile(r"(?:reported from|remote target) /job:(\w+)/(?:replica:\d+/)?task:(\d+)")
SAME_WORKERS = (
    "start every worker with the same flags, and with the same --workdir on a disk that all of them share"
)


class WorkerLostError(TryAgainError):
    """Another worker has ended, so that no step can be computed."""


def read_tf_config() -> dict[str, Any]:
    """Reads TF_CONFIG, which lists the workers and identifies this process among them.

    Returns:
      `cluster`: `worker` and optionally `chief`, to lists of `host:port`; `task`: `type` and `index`.

    Raises:
      UserError: TF_CONFIG is missing or malformed.
    """
    text = os.environ.get("TF_CONFIG")
    wrong = f"--strategy=multiworker: TF_CONFIG={text}: "
    expected = f"; expected a value such as {TF_CONFIG_EXAMPLE}"
    if not text:
        raise UserError(f"--strategy=multiworker: TF_CONFIG is not set{expected}")
    try:
        config = json.loads(text)
        cluster, kind, index = config["cluster"], config["task"]["type"], int(config["task"]["index"])
        hosts = {job: list(addresses) for job, addresses in cluster.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{wrong}{reason}{expected}") from error
    if other := sorted(hosts.keys() - {"chief", "worker"}):
        raise UserError(
            f"{wrong}a cluster consists of workers and at most one chief, got {other[0]!r}{expected}"
        )
    if len(hosts.get("chief", [])) > 1:
        raise UserError(f"{wrong}a cluster has at most one chief, got {len(hosts['chief'])}{expected}")
    if kind not in hosts or not 0 <= index < len(hosts[kind]):
        raise UserError(f"{wrong}the cluster has no {kind} {index}{expected}")
    for address in (address for addresses in hosts.values() for address in addresses):
        if not isinstance(address, str) or not re.fullmatch(r"[^:\s]+:\d+|\[[^\]]+\]:\d+", address):
            raise UserError(f"{wrong}{address!r} is not host:port{expected}")
    return {"cluster": hosts, "task": {"type": kind, "index": index}}


def connect() -> tf.distribute.Strategy:
    """Makes the strategy of the workers in TF_CONFIG; waits for all of them.

    Raises:
      UserError: TF_CONFIG is wrong, or this worker's port is in use.
      WorkerLostError: another worker did not start, or ended.
    """
    config = read_tf_config()
    kind, index = config["task"].values()
    hosts = config["cluster"]
    count = sum(map(len, hosts.values()))
    print(f"{kind} {index} at {hosts[kind][index]}: waiting for all {count} workers", flush=True)
    try:
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
    except tf.errors.OpError as error:
        if "Could not start gRPC server" in str(error):
            raise UserError(
                f"--strategy=multiworker: cannot listen at {hosts[kind][index]}, the address of this worker in TF_CONFIG; the "
                "port is in use, or the address is that of another machine"
            ) from error
        raise find_lost_worker(error) or error from error
    # Every batch of a step is complete. Otherwise workers would ask each other before each step whether all have a batch
    # left, and shapes would not be static.
    strategy.extended.experimental_enable_get_next_as_optional = False
    return strategy


def find_lost_worker(error: BaseException) -> WorkerLostError | None:
    """The error to report when TensorFlow raised `error` because another worker is gone; None for any other error."""
    text = str(error)
    if not (isinstance(error, _LOST) and _LOST_TEXT.search(text)):
        return None
    found = _WORKER_TEXT.search(text)
    who = f"{found[1]} {found[2]}" if found else "another worker"
    why = " (its heartbeat stopped)" if "heartbeat" in text else ""
    return WorkerLostError(
        f"lost {who}{why}, without which no step can be computed; saved checkpoints are kept: run the same command on every "
        "worker to continue"
    )


class Workers:
    """Workers of a run; a single one, which is the chief, for other strategies.

    Attributes:
      rank: number of this worker, 0 to count - 1, in the order in which they take a step's views; the chief's is 0.
    """

    def __init__(self, strategy: tf.distribute.Strategy) -> None:
        self._strategy = strategy
        self.count, self.rank = 1, 0
        if isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
            resolver = strategy.cluster_resolver
            jobs = resolver.cluster_spec().as_dict()
            self.count = sum(map(len, jobs.values()))
            chiefs = len(jobs.get("chief", ()))
            self.rank = resolver.task_id + (chiefs if resolver.task_type == "worker" else 0)

    @property
    def chief(self) -> bool:
        """Whether this worker evaluates and writes."""
        return self.rank == 0

    def gather(self, number: int) -> np.ndarray:
        """The numbers of all workers, int64 [count], by rank. Collective."""
        return self._gather_row(np.array([number]))[:, 0]

    def _gather_row(self, row: np.ndarray) -> np.ndarray:
        """The rows of integers [n] of all workers, int64 [count, n], by rank. Collective."""
        rows = np.zeros([self.count, len(row)], np.int64)
        rows[self.rank] = row
        if self.count == 1:
            return rows
        with tf.device("CPU"):
            value = tf.identity(tf.constant(rows))
        return np.asarray(self._strategy.reduce("SUM", value, axis=None))

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Context in which errors of TensorFlow because of a lost worker name that worker.

        Raises:
          WorkerLostError: instead of TensorFlow's error.
        """
        try:
            yield
        except tf.errors.OpError as error:
            if self.count == 1 or (found := find_lost_worker(error)) is None:
                raise
            raise found from error

    def wait(self) -> None:
        """Waits until all workers call it. Collective."""
        self.gather(0)

    def check_same(self, values: dict[str, Any], *, remedy: str) -> None:
        """Compares values, such as flags, between all workers. Collective.

        Raises:
          UserError: on every worker, with both sides, if a worker has other values.
        """
        text = np.frombuffer(json.dumps(values).encode(), np.uint8)
        sizes = self.gather(len(text))
        rows = self._gather_row(np.resize(text, sizes.max())).astype(np.uint8)
        everywhere = [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes, strict=True)]
        for rank, other in enumerate(everywhere):
            if lines := differences(other, everywhere[0], sides=(f"at worker {rank}", "at the chief")):
                raise UserError(f"the workers differ: {'; '.join(lines)}; {remedy}")
