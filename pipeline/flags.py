"""Command-line flags, parsed strictly: an unknown one is a mistake, and a mistake is one line."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import Any, NoReturn

from pipeline.errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, as UserError, and no abbreviated flags."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raises instead of printing usage."""
        raise UserError(f"{message} (--help lists the flags)")

    def flag_names(self) -> list[str]:
        """All flags, `--help` included."""
        return [name for action in self._actions for name in action.option_strings]

    def refuse(self, unknown: Sequence[str], *, also: Sequence[str] = ()) -> None:
        """Raises UserError for the first unknown argument, with the nearest flag, of ours or `also`."""
        if unknown:
            name = unknown[0].split("=")[0]
            near = difflib.get_close_matches(name, [*self.flag_names(), *also], n=1)
            hint = f"; did you mean {near[0]}?" if near else " (--help lists the flags)"
            raise UserError(f"unknown flag {unknown[0]}{hint}")

    def parse_strictly(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parses flags; an unknown one is an error that names the nearest."""
        known, unknown = self.parse_known_args(argv)
        self.refuse(unknown)
        return known


def positive(text: str) -> int:
    """argparse type: a whole number, 1 or more."""
    return _integer(text, at_least=1)


def whole(text: str) -> int:
    """argparse type: a whole number, 0 or more."""
    return _integer(text, at_least=0)


def _integer(text: str, *, at_least: int) -> int:
    try:
        number = int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number") from error
    if number < at_least:
        raise argparse.ArgumentTypeError(f"{text}: expected {at_least} or more")
    return number
