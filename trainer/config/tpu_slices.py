"""TPU slices: how many hosts a type has, and why only those of one host are taken."""

from __future__ import annotations

import dataclasses

from pipeline.errors import UserError

WHY_ONE_HOST = (
    "slices of a single host are supported, such as v3-8: TPUStrategy drives all hosts from one client, and the "
    "ArrayRecord reader is Python, which runs on the client's host alone"
)
_DOCS = "docs/tpu.md has the evidence, and what a way through would take"


@dataclasses.dataclass(frozen=True)
class Generation:
    """How types of one TPU generation are named and built.

    Sources: cloud.google.com/tpu/docs/v2, v3, v4, v5e, v5p.

    Attributes:
      counted: what the number in a type counts, `cores` or `chips`.
      on_a_host: how many of them the largest slice of one host has.
      on_each: how many of them each host of a larger slice has.
      per_replica: how many of them make a replica, at most: two cores where they may be joined to one (megacore).
    """

    counted: str
    on_a_host: int
    on_each: int
    per_replica: int = 1


GENERATIONS = {
    "v2": Generation("cores", on_a_host=8, on_each=8),
    "v3": Generation("cores", on_a_host=8, on_each=8),
    "v4": Generation("cores", on_a_host=8, on_each=8, per_replica=2),
    "v5litepod": Generation("chips", on_a_host=8, on_each=4),
    "v5p": Generation("cores", on_a_host=8, on_each=8, per_replica=2),
}
_ALSO_CALLED = {"v5e": "v5litepod", "v5lite": "v5litepod"}
_SINGLE = "v2-8, v3-8, v4-8, v5litepod-1, -4 and -8 (or v5e-8), v5p-8"


def check_type(asked: str) -> str:
    """The accelerator type as the Cloud TPU API calls it.

    Args:
      asked: such as `v3-8` or `v5e-8`.

    Raises:
      UserError: there is none of that name, TensorFlow does not run on it, or it has several hosts.
    """
    name, _, number = asked.lower().rpartition("-")
    name = _ALSO_CALLED.get(name, name)
    if name.startswith(("v6", "tpu7")):
        raise UserError(
            f"--type={asked}: TensorFlow does not support TPUs from v6e on (docs.cloud.google.com, `Training with TPU "
            f"accelerators`); take one of {_SINGLE}"
        )
    if name not in GENERATIONS or not number.isdecimal() or int(number) < 1:
        raise UserError(f"--type={asked}: no such TPU type; take one of {_SINGLE}")
    generation = GENERATIONS[name]
    if int(number) > generation.on_a_host:
        check_hosts(f"--type={asked}", -(-int(number) // generation.on_each))
    return f"{name}-{number}"


def fewest_replicas(node_type: str) -> int:
    """The fewest replicas that a TPUStrategy has on a type, as `check_type` returns it."""
    name, _, number = node_type.rpartition("-")
    return max(int(number) // GENERATIONS[name].per_replica, 1)


def check_hosts(flag: str, count: int) -> None:
    """Refuses a slice of several hosts.

    Args:
      flag: as given, such as `--tpu=pod`.
      count: hosts of its slice.

    Raises:
      UserError: there are several.
    """
    if count > 1:
        raise UserError(f"{flag}: a slice of {count} hosts; {WHY_ONE_HOST}; {_DOCS}")
