"""`--strategy=tpu`: the TPU of this machine, with all of its cores.

TPUStrategy drives all hosts of a slice from one client, and would have each host make its own input. Ours reads
ArrayRecord files in Python, which TensorFlow can run in the client's process alone. So the client has to run on the
TPU's host, and there can be only one: a TPU VM with a slice of a single host, such as v3-8 or v4-8.
"""

from __future__ import annotations

import socket

import tensorflow as tf

from pipeline.errors import UserError
from pipeline.errors.causes import first_line
from trainer.config.tpu_slices import check_hosts

_SECONDS = 10  # for an answer from the TPU's address; TensorFlow itself waits for ever


def connect(tpu: str | None) -> tf.distribute.Strategy:
    """The strategy of a TPU.

    Args:
      tpu: `local`, on the TPU's own machine; or a name that the Cloud TPU API knows, or `grpc://host:port`, of which
        the host is this machine.

    Raises:
      UserError: there is no such TPU, it is another machine's, or it has several hosts.
    """
    if not tpu:
        raise UserError("--strategy=tpu: which one? pass --tpu=local on the TPU's own machine, or --tpu=NAME")
    resolver = _resolve(tpu)
    if tpu != "local":
        addresses = resolver.cluster_spec().job_tasks(resolver.task_type)
        check_hosts(f"--tpu={tpu}", len(addresses))
        check_address(tpu, addresses[0])
        tf.config.experimental_connect_to_cluster(resolver)
    try:
        tf.tpu.experimental.initialize_tpu_system(resolver)
    except (tf.errors.OpError, ValueError, RuntimeError) as error:
        raise UserError(
            f"--tpu={tpu}: no TPU here: {first_line(error)}; run on a TPU VM with TensorFlow's build for TPUs, or with another "
            "--strategy"
        ) from error
    check_hosts(f"--tpu={tpu}", resolver.get_tpu_system_metadata().num_hosts)
    return tf.distribute.TPUStrategy(resolver)


def _resolve(tpu: str) -> tf.distribute.cluster_resolver.TPUClusterResolver:
    """The resolver of a name, which asks the Cloud TPU API where it is."""
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=tpu)
        if tpu != "local":
            resolver.cluster_spec()
    except Exception as error:  # of urllib, googleapiclient, oauth2client, or TensorFlow's own
        raise UserError(
            f"--tpu={tpu}: cannot be looked up: {first_line(error)}; on the TPU's own machine, --tpu=local needs no lookup"
        ) from error
    return resolver


def check_address(tpu: str, address: str) -> None:
    """Refuses an address that is not this machine's, or where nobody answers.

    Args:
      tpu: as given.
      address: of the TPU's host, `host:port`.

    Raises:
      UserError: it is one.
    """
    host, _, port = address.rpartition(":")
    try:
        name = str(socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0][4][0])
        with socket.create_connection((name, int(port)), timeout=_SECONDS):
            pass
    except (OSError, ValueError) as error:
        raise UserError(
            f"--tpu={tpu}: nobody answers at {address}: {error}; on the TPU's own machine, pass --tpu=local"
        ) from error
    family = socket.AF_INET6 if ":" in name else socket.AF_INET
    try:  # only a machine's own address can be bound
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((name, 0))
    except OSError as error:
        raise UserError(
            f"--tpu={tpu}: its host is {address}, another machine; the ArrayRecord reader is Python and has to run on the "
            "TPU's own host: run there, with --tpu=local"
        ) from error
