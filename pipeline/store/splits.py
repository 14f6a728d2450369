"""Names of splits and slices, such as `test` and `train[800:]`, in the files of a store."""

from __future__ import annotations

import dataclasses
import math
import re

_SLICE = re.compile(r"\[([^\]:]*)(?::([^\]]*))?\]")
_PART = re.compile(r"(?P<base>[\w-]+)(?:\[(?P<start>\d*%?):(?P<stop>\d*%?)\])?")


def file_split(split: str) -> str:
    """Name of a split or slice in file names and TFDS metadata, which do not support slices.

    Whole splits keep their name, `train[800:]` becomes `train_from_800`, `train[10%:20%]` becomes
    `train_from_10pct_to_20pct`. Different slices may have the same name (`train[3shard]`, `train[3shard:]`): callers refuse
    such pairs. The names of existing stores depend on this function.
    """

    def spell(found: re.Match[str]) -> str:
        start, stop = found.groups()
        return (f"_from_{start}" if start else "") + (f"_to_{stop}" if stop else "")

    text = _SLICE.sub(spell, split).replace("%", "pct").replace("+", "_and_").replace(" ", "")
    return re.sub(r"[^A-Za-z0-9_-]", lambda found: f"_{ord(found[0]):x}_", text)


@dataclasses.dataclass(frozen=True)
class _Part:
    """A whole split, or an interval of one in examples or percent; `unit` is None if the interval is unknown."""

    base: str
    start: float = 0
    stop: float = math.inf
    unit: str | None = None

    def overlaps(self, other: _Part) -> bool:
        if "all" in (self.base, other.base):  # every split, in TFDS
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
    """Whether two splits may share examples, according to their names.

    Intervals in different units, negative ones and shards count as overlapping, because a name does not give the length of
    a split.
    """
    return any(ours.overlaps(theirs) for ours in _parts(a) for theirs in _parts(b))
