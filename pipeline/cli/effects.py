"""Refuses flags without effect, by a table of conditions per command.

A flag that is silently ignored gives a run that differs from the one that was asked for.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence

from pipeline.cli.parser import Parser
from pipeline.errors import UserError


@dataclasses.dataclass(frozen=True)
class Condition:
    """When a flag has an effect.

    Attributes:
      holds: returns whether the flag has an effect, given all flags.
      otherwise: completes the message "has no effect ...", such as "without --html".
    """

    holds: Callable[[argparse.Namespace], bool]
    otherwise: str


def never(otherwise: str) -> Condition:
    """The condition of a flag that has no effect."""
    return Condition(lambda _: False, otherwise)


def refuse_without_effect(
    parser: Parser, argv: Sequence[str], flags: argparse.Namespace, *, conditions: Mapping[str, Condition]
) -> None:
    """Refuses given flags that have no effect.

    Args:
      argv: its arguments.
      flags: the parsed arguments.
      conditions: by flag name without dashes; a flag that is not listed always has an effect.

    Raises:
      UserError: a flag has no effect.
    """
    for name in parser.given(argv):
        if name in conditions and not conditions[name].holds(flags):
            value = getattr(flags, name)
            value = ",".join(map(str, value)) if isinstance(value, list) else value
            text = f"--{name}" if isinstance(value, bool) else f"--{name}={value}"
            raise UserError(f"{text}: has no effect {conditions[name].otherwise}; leave it out")


def parse_effective(
    parser: Parser, argv: Sequence[str], conditions: Mapping[str, Condition]
) -> argparse.Namespace:
    """Parses arguments strictly and refuses flags without effect.

    Raises:
      UserError: a flag is unknown, out of range, or has no effect.
    """
    flags = parser.parse_strictly(argv)
    refuse_without_effect(parser, argv, flags, conditions=conditions)
    return flags
