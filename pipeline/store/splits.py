"""Splits and slices of a data set as a store names them, such as `test` and `train[800:]`."""

from __future__ import annotations

import dataclasses
import math
import re

_SLICE = re.compile(r"\[([^\]:]*)(?::([^\]]*))?\]")
_PART = re.compile(r"(?P<base>[\w-]+)(?:\[(?P<start>\d*%?):(?P<stop>\d*%?)\])?")


def file_split(split: str) -> str:
    """The name that a split has in file names and in TFDS's metadata, which take no slices.

    A whole split has its own, `train[800:]` is `train_from_800`, `train[10%:20%]` is `train_from_10pct_to_20pct`.
    """

    def spell(found: re.Match[str]) -> str:
        start, stop = found.groups()
        return (f"_from_{start}" if start else "") + (f"_to_{stop}" if stop else "")

    text = _SLICE.sub(spell, split).replace("%", "pct").replace("+", "_and_").replace(" ", "")
    return re.sub(r"[^A-Za-z0-9_-]", lambda found: f"_{ord(found[0]):x}_", text)


@dataclasses.dataclass(frozen=True)
class _Part:
    """A whole split, or an interval of one in examples or percent; `unit` is None where the interval is not known."""

    base: str
    start: float = 0
    stop: float = math.inf
    unit: str | None = None

    def overlaps(self, other: _Part) -> bool:
        if "all" in (self.base, other.base):  # of TFDS: every split
            return True
        if self.base != other.base:
            return False
        if self.unit is None or other.unit is None or self.unit != other.unit:
            return True
        return max(self.start, other.start) < min(self.stop, other.stop)


def _parts(split: str) -> list[_Part]:
    out = []
    for text in split.replace(" ", "").split("+"):
        found = _PART.fullmatch(text)
        if found is None or found["start"] is None:
            out.append(_Part(text.split("[")[0]))
            continue
        start, stop = found["start"], found["stop"]
        unit = "%" if "%" in start + stop else "examples"
        out.append(
            _Part(found["base"], float(start.rstrip("%") or 0), float(stop.rstrip("%") or math.inf), unit)
        )
    return out


def may_overlap(a: str, b: str) -> bool:
    """Whether two splits may have examples in common, by their names alone.

    Intervals in different units, negative ones and shards count as overlapping: how long a split is, its name does not say.
    """
    return any(ours.overlaps(theirs) for ours in _parts(a) for theirs in _parts(b))
