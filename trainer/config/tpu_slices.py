"""TPU types: number of hosts per slice, and the check that a slice has a single host."""

from __future__ import annotations

import dataclasses

from pipeline.errors import UserError

_WHY_ONE_HOST = (
    "only slices with a single host are supported, such as v3-8, because TPUStrategy drives all hosts from one client, and "
    "the ArrayRecord reader is Python code that runs on the client's host; see docs/tpu.md"
)


@dataclasses.dataclass(frozen=True)
class Generation:
    """Types of one TPU generation.

    Sources: cloud.google.com/tpu/docs/v2, v3, v4, v5e, v5p, v6e, and for `runtime` cloud.google.com/tpu/docs/runtimes.

    Attributes:
      per_host: the number in the name of the largest type with a single host, in cores or chips.
      per_host_of_many: cores or chips per host of larger slices.
      per_replica: maximum number of cores or chips per replica; 2 if two cores may form one (megacore).
      runtime: software version of the TPU VM for frameworks that the user installs, as ours is.
    """

    per_host: int
    per_host_of_many: int
    per_replica: int = 1
    runtime: str = "tpu-ubuntu2204-base"


GENERATIONS = {  # v5litepod and v6e count chips, the others count cores
    "v2": Generation(per_host=8, per_host_of_many=8),
    "v3": Generation(per_host=8, per_host_of_many=8),
    "v4": Generation(per_host=8, per_host_of_many=8, per_replica=2),
    "v5litepod": Generation(per_host=8, per_host_of_many=4, runtime="v2-alpha-tpuv5-lite"),
    "v5p": Generation(per_host=8, per_host_of_many=8, per_replica=2, runtime="v2-alpha-tpuv5"),
    "v6e": Generation(per_host=8, per_host_of_many=4, runtime="v2-alpha-tpuv6e"),
}
_ALIASES = {"v5e": "v5litepod", "v5lite": "v5litepod"}
_SUPPORTED = "v2-8, v3-8, v4-8, v5litepod-1, -4 and -8 (or v5e-8), v5p-8, v6e-1, -4 and -8"


def check_type(asked: str) -> str:
    """Returns the accelerator type as the Cloud TPU API spells it.

    Args:
      asked: type such as `v3-8` or `v5e-8`.

    Raises:
      UserError: the type does not exist, TensorFlow does not support it, or it has several hosts.
    """
    name, _, number = asked.lower().rpartition("-")
    name = _ALIASES.get(name, name)
    if name.startswith("tpu7"):
        raise UserError(
            f"--type={asked}: TensorFlow does not support TPU7x (docs.cloud.google.com, `Training with TPU accelerators`); use "
            f"one of {_SUPPORTED}"
        )
    if name not in GENERATIONS or not number.isdecimal() or int(number) < 1:
        raise UserError(f"--type={asked}: no such TPU type; use one of {_SUPPORTED}")
    generation = GENERATIONS[name]
    if int(number) > generation.per_host:
        check_hosts(f"--type={asked}", -(-int(number) // generation.per_host_of_many))
    return f"{name}-{number}"


def runtime_version(node_type: str) -> str:
    """Software version of the TPU VM for a type that `check_type` returned."""
    return GENERATIONS[node_type.rpartition("-")[0]].runtime


def fewest_replicas(node_type: str) -> int:
    """Minimum number of replicas of a TPUStrategy on a type that `check_type` returned."""
    name, _, number = node_type.rpartition("-")
    return max(int(number) // GENERATIONS[name].per_replica, 1)


def check_hosts(flag: str, count: int) -> None:
    """Refuses a slice with several hosts."""
    if count > 1:
        raise UserError(f"{flag}: this slice has {count} hosts; {_WHY_ONE_HOST}")
