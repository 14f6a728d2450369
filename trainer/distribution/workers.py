"""Several processes, one a machine, that train one student together: `--strategy=multiworker`.

Every worker runs the same command and takes part in every step; TensorFlow's MultiWorkerMirroredStrategy adds their
gradients up. One of them, the chief, evaluates and writes; all of them read the same `--workdir`. What only the chief
does must not be collective, or it would wait for ever for the others; what is collective must be done by all, at the
same steps.
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

# What TensorFlow's collectives end with when a worker they wait for is gone, or has begun again.
_LOST = (
    tf.errors.UnavailableError,
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
    tf.errors.FailedPreconditionError,
)
_SAYS_LOST = re.compile(r"Collective ops is aborted|oordination|remote target /job|heartbeat")
_SAYS_WHO = re.compile(r"(?:reported from|remote target) /job:(\w+)/(?:replica:\d+/)?task:(\d+)")
SAME_WORKERS = (
    "start every worker with the same flags, and with the same --workdir on a disk that all of them see"
)


class WorkerLostError(TryAgainError):
    """Another worker ended, so that no step can be done."""


def read_tf_config() -> dict[str, Any]:
    """TF_CONFIG, which says what workers there are, and which of them this process is.

    Returns:
      `cluster`: `worker` and, if there is one, `chief`, to lists of `host:port`; `task`: `type` and `index`.

    Raises:
      UserError: it is not set, or is not that.
    """
    text = os.environ.get("TF_CONFIG")
    wrong = f"--strategy=multiworker: TF_CONFIG={text}: "
    expected = f"; expected such as {TF_CONFIG_EXAMPLE}"
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
            f"{wrong}a cluster has workers and at most a chief, but there is {other[0]!r}{expected}"
        )
    if len(hosts.get("chief", [])) > 1:
        raise UserError(f"{wrong}there is one chief at most{expected}")
    if kind not in hosts or not 0 <= index < len(hosts[kind]):
        raise UserError(f"{wrong}the cluster has no {kind} {index}{expected}")
    for address in (address for addresses in hosts.values() for address in addresses):
        if not isinstance(address, str) or not re.fullmatch(r"[^:\s]+:\d+|\[[^\]]+\]:\d+", address):
            raise UserError(f"{wrong}{address!r} is not host:port{expected}")
    return {"cluster": hosts, "task": {"type": kind, "index": index}}


def connect() -> tf.distribute.Strategy:
    """The strategy of the workers that TF_CONFIG names; waits for all of them.

    Raises:
      UserError: TF_CONFIG is wrong, or this worker's port is taken.
      WorkerLostError: another one did not come, or ended.
    """
    config = read_tf_config()
    kind, index = config["task"].values()
    hosts = config["cluster"]
    count = sum(map(len, hosts.values()))
    print(f"{kind} {index} at {hosts[kind][index]} waits for {count} workers in all", flush=True)
    try:
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
    except tf.errors.OpError as error:
        if "Could not start gRPC server" in str(error):
            raise UserError(
                f"--strategy=multiworker: cannot listen at {hosts[kind][index]}, which is this worker's address in "
                "TF_CONFIG: the port is taken, or the address is another machine's"
            ) from error
        raise find_lost_worker(error) or error from error
    # Every batch of a step is whole. Otherwise workers would ask each other before each step whether all have one left,
    # and the batches' shapes would not be static.
    strategy.extended.experimental_enable_get_next_as_optional = False
    return strategy


def find_lost_worker(error: BaseException) -> WorkerLostError | None:
    """The line for what TensorFlow raises when another worker is gone; None if it is another error."""
    text = str(error)
    if not (isinstance(error, _LOST) and _SAYS_LOST.search(text)):
        return None
    found = _SAYS_WHO.search(text)
    who = f"{found[1]} {found[2]}" if found else "another worker"
    why = " (its heartbeat stopped)" if "heartbeat" in text else ""
    return WorkerLostError(
        f"lost {who}{why}: no step can be done without it; what was saved stays, run the same command on every worker to "
        "continue"
    )


class Workers:
    """The workers of a run; one, the chief, where there are not several.

    Attributes:
      count: how many there are.
      rank: this one, 0 to count - 1, in the order in which they take a step's views; the chief's is 0.
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
        """Whether this one evaluates and writes."""
        return self.rank == 0

    def gather(self, number: int) -> np.ndarray:
        """Everybody's number, int64 [count], by rank. Collective: all have to call it."""
        return self._gather_row(np.array([number]))[:, 0]

    def _gather_row(self, row: np.ndarray) -> np.ndarray:
        """Integers [n] of all workers: int64 [count, n], by rank. Collective."""
        rows = np.zeros([self.count, len(row)], np.int64)
        rows[self.rank] = row
        if self.count == 1:
            return rows
        with tf.device("CPU"):
            value = tf.identity(tf.constant(rows))
        return np.asarray(self._strategy.reduce("SUM", value, axis=None))

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Names the worker that is gone, where TensorFlow says that there is one.

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
        """Until all are here. Collective."""
        self.gather(0)

    def check_same(self, values: dict[str, Any], *, remedy: str) -> None:
        """Compares values, such as flags, between all workers. Collective.

        Args:
          values: JSON values by name.
          remedy: the end of the error message.

        Raises:
          UserError: on every worker, with both sides, if one has other values.
        """
        text = np.frombuffer(json.dumps(values).encode(), np.uint8)
        sizes = self.gather(len(text))
        rows = self._gather_row(np.resize(text, sizes.max()))
        everywhere = [
            json.loads(bytes(row[:size].astype(np.uint8))) for row, size in zip(rows, sizes, strict=True)
        ]
        for rank, other in enumerate(everywhere):
            if lines := differences(other, everywhere[0], sides=(f"at worker {rank}", "at the chief")):
                raise UserError(f"the workers differ: {'; '.join(lines)}; {remedy}")
