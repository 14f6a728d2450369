"""`--strategy=tpu`: all cores of the TPU of this machine.

TPUStrategy drives all hosts of a slice from one client, and expects each host to produce its own input. The ArrayRecord reader
is Python code, which TensorFlow can run only in the client's process. So the client has to run on the TPU's host, and the slice
must have a single host, such as v3-8 or v4-8.
"""

from __future__ import annotations

import socket

import tensorflow as tf

from pipeline.errors import UserError
from pipeline.errors.causes import first_line
from trainer.config.tpu_slices import check_hosts

_SECONDS = 10  # timeout for the TPU's address; TensorFlow itself has none


def connect(tpu: str | None) -> tf.distribute.Strategy:
    """Makes the strategy of a TPU.

    Args:
      tpu: `local`, on the TPU's own machine; or a name in the Cloud TPU API, or `grpc://host:port`, of which the host is this
        machine.

    Raises:
      UserError: the TPU does not exist, is on another machine, or has several hosts.
    """
    if not tpu:
        raise UserError(
            "--strategy=tpu: needs --tpu; pass --tpu=local on the TPU's own machine, or --tpu=NAME"
        )
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
            f"--tpu={tpu}: no TPU found: {first_line(error)}; run on a TPU VM with TensorFlow's build for TPUs, or use another "
            "--strategy"
        ) from error
    check_hosts(f"--tpu={tpu}", resolver.get_tpu_system_metadata().num_hosts)
    return tf.distribute.TPUStrategy(resolver)


def _resolve(tpu: str) -> tf.distribute.cluster_resolver.TPUClusterResolver:
    """The resolver of a name, which asks the Cloud TPU API for the address."""
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=tpu)
        if tpu != "local":
            resolver.cluster_spec()
    except Exception as error:  # of urllib, googleapiclient, oauth2client or TensorFlow
        raise UserError(
            f"--tpu={tpu}: lookup failed: {first_line(error)}; on the TPU's own machine, pass --tpu=local"
        ) from error
    return resolver


def check_address(tpu: str, address: str) -> None:
    """Refuses an address of another machine, or one that does not answer."""
    host, _, port = address.rpartition(":")
    try:
        name = str(socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0][4][0])
        with socket.create_connection((name, int(port)), timeout=_SECONDS):
            pass
    except (OSError, ValueError) as error:
        raise UserError(
            f"--tpu={tpu}: no answer from {address}: {error}; on the TPU's own machine, pass --tpu=local"
        ) from error
    family = socket.AF_INET6 if ":" in name else socket.AF_INET
    try:  # only an address of this machine can be bound
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((name, 0))
    except OSError as error:
        raise UserError(
            f"--tpu={tpu}: its host, {address}, is another machine, but the ArrayRecord reader has to run on the TPU's host; run "
            "the command there, with --tpu=local"
        ) from error
