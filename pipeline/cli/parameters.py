"""Errors of the library name parameters, such as `dataset`; commands print them as flags, such as --dataset.

The convention: a message puts a parameter in backticks, "`image_size`=5000: expected 1 to 4096". The name is that of the
flag without dashes. Text that crossed a process, as from a Beam worker, keeps it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_PARAMETER = re.compile(r"`(\w+)`")
_flags: set[str] = set()  # of the parsers that this process has used


def register_flags(names: Iterable[str]) -> None:
    """Adds flags of this command, such as `--dataset`."""
    _flags.update(names)


def with_flags(message: str) -> str:
    """The message with each parameter in backticks written as the flag of that name, where the command has one."""
    return _PARAMETER.sub(lambda found: flag if (flag := f"--{found[1]}") in _flags else found[0], message)
