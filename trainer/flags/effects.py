"""Flags that have an effect only together with others; given without those, they are refused.

A flag that is dropped silently is a run other than the one that was asked for.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence

from pipeline.cli.parser import Parser
from pipeline.errors import UserError
from pipeline.storage.bucket import is_url

LIVE_ARMS = ("online", "independent", "consistent")


@dataclasses.dataclass(frozen=True)
class Condition:
    """When a flag has an effect.

    Attributes:
      holds: whether it has one, with these flags.
      needs: the same for the user, after "has no effect without".
    """

    holds: Callable[[argparse.Namespace], bool]
    needs: str


def parse_effective(
    parser: Parser, argv: Sequence[str], conditions: Mapping[str, Condition]
) -> argparse.Namespace:
    """Parses arguments strictly, and refuses a flag among them that has no effect.

    Args:
      parser: of the command.
      argv: its arguments.
      conditions: of those flags that do not always have an effect, by name without dashes.

    Returns:
      The flags.

    Raises:
      UserError: one is unknown, out of range, or has no effect.
    """
    flags = parser.parse_strictly(argv)
    for name in parser.given(argv):
        if name in conditions and not conditions[name].holds(flags):
            value = getattr(flags, name)
            text = f"--{name}" if isinstance(value, bool) else f"--{name}={value}"
            raise UserError(f"{text}: has no effect without {conditions[name].needs}; leave it out")
    return flags


_DECAY = Condition(lambda flags: flags.weight_decay != 0, "a --weight_decay above 0")
# Of a run and of a comparison; `check_strategy` refuses the flags of another strategy.
SHARED = {
    "shard_cache_bytes": Condition(lambda flags: is_url(flags.store or ""), "a --store in a bucket"),
    "decay_mode": _DECAY,
    "decay_kernels_only": _DECAY,
    "clip_norm": Condition(lambda flags: flags.clip != "none", "a --clip other than none"),
}
TRAIN = {
    **SHARED,
    "views_per_shard": Condition(lambda flags: flags.write_back, "--write_back"),
    "teacher": Condition(lambda flags: flags.arm != "fixed", "an --arm that runs a teacher"),
}
COMPARE = {
    **SHARED,
    "teacher": Condition(
        lambda flags: any(arm in LIVE_ARMS for arm in flags.arms), f"one of --arms={','.join(LIVE_ARMS)}"
    ),
    "measure": Condition(
        lambda flags: not flags.measure or ("online" in flags.arms and flags.strategy == "default"),
        "--arms=online and --strategy=default",
    ),
}
# With --from, nothing is trained: these flags alone have an effect.
WITH_FROM = ("store", "workdir", "earlier")


FINETUNE = {
    "teacher_value_range": Condition(lambda flags: flags.teacher is not None, "--teacher"),
    "data_dir": Condition(lambda flags: flags.dataset is not None, "--dataset"),
}
