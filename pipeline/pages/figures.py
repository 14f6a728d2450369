"""Numbers of a JSON tree as HTML: formatted for readers, with their path in the tree and their exact value."""

from __future__ import annotations

import datetime
import html
import json
import math
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from pipeline.cli.units import bytes_text, three_digits
from pipeline.errors.text import printable
from pipeline.precomputing.reports import without_rounding

if TYPE_CHECKING:
    from markupsafe import Markup

_TIMES = "\N{MULTIPLICATION SIGN}"
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
# Parts of a path: an escape, a dot between names, or plain characters.
_PATH = re.compile(r"\\(x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8}|.)|(\.)|([^.\\]+)", re.DOTALL)
_LINE_ENDS = {"n": "\n", "r": "\r", "t": "\t"}
_TEXTS = ("text", "seeds", "date", "digest", "command")  # kinds for values of any type


def _minus(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")


def _points(value: float) -> str:
    """Percentage points with a sign, unless they round to 0."""
    text = f"{100 * value:+.2f}"
    return "0.00" if float(text) == 0 else _minus(text)


def number_text(value: float) -> str:
    """Three significant digits, with a power of ten for very large and very small numbers."""
    if value == 0:
        return "0"
    if not math.isfinite(value):  # where a large number of a foreign file was multiplied
        return _minus(f"{value}")
    if isinstance(value, int) or (1000 <= abs(value) < 1e6):
        return _minus(f"{value:,.0f}")
    if 1e-3 <= abs(value) < 1000:
        return _minus(three_digits(value))
    digits, power = f"{value:.2e}".split("e")
    return f"{_minus(digits)}\N{NO-BREAK SPACE}{_TIMES}\N{NO-BREAK SPACE}10{str(int(power)).translate(_SUPERSCRIPTS)}"


def duration_text(seconds: float) -> str:
    """A duration in milliseconds, seconds, minutes or hours."""
    if 0 < seconds < 1:
        return f"{three_digits(1e3 * seconds)} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def _seeds_text(seeds: list[Any]) -> str:
    """Number of runs and their seeds."""
    return f"{len(seeds)} ({'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))})"


def _date_text(text: Any) -> str:
    try:
        return datetime.datetime.fromisoformat(text).strftime("%-d %B %Y, %H:%M %Z").strip()
    except (TypeError, ValueError):
        return str(text)


KINDS: dict[str, Callable[[Any], str]] = {
    "percent": lambda value: f"{value:.2%}",
    "share": lambda value: f"{value:.2f}",
    "points": _points,
    "more": lambda value: _minus(f"{100 * value:+.0f}%"),
    "size_of_points": lambda value: f"{100 * abs(value):.2f}",
    "count": lambda value: f"{value:,}" if isinstance(value, int) else number_text(value),
    "number": number_text,
    "kl": lambda value: number_text(without_rounding(value)),
    "seconds": duration_text,
    "milliseconds": lambda value: number_text(1e3 * value),
    "bytes": bytes_text,
    "text": lambda value: value if isinstance(value, str) else json.dumps(value),
    "seeds": lambda value: _seeds_text(value) if isinstance(value, list) else str(value),
    "date": _date_text,
    "digest": lambda value: str(value)[:16],
    "command": lambda value: str(value).replace(" --", " \\\n    --"),
}


def join(*names: str | int) -> str:
    """Joins names to a path; escapes dots, backslashes and control characters in names."""
    return ".".join(printable(str(name).replace("\\", "\\\\").replace(".", "\\.")) for name in names)


def _split(path: str) -> list[str]:
    """The names of a path; the inverse of `join`."""
    names = [""]
    for escape, dot, rest in _PATH.findall(path):
        if dot:
            names.append("")
        elif escape[:1] in ("x", "u", "U") and escape[1:]:
            names[-1] += chr(int(escape[1:], 16))
        else:
            names[-1] += _LINE_ENDS.get(escape, escape) or rest
    return names


def look_up(tree: Any, path: str) -> Any:
    """Value at a path such as `runs.0.top1`, or None."""
    for name in _split(path):
        if isinstance(tree, list):
            tree = tree[int(name)] if name.isdecimal() and int(name) < len(tree) else None
        elif isinstance(tree, dict):
            tree = tree.get(name)
        else:
            return None
    return tree


def leaves(tree: Any, prefix: str) -> Iterator[tuple[str, str]]:
    """Yields (path, name) of each leaf below `prefix` in a tree of dicts; names are relative to it."""
    below = look_up(tree, prefix)
    if not isinstance(below, dict):
        return

    def walk(branch: dict[str, Any], names: tuple[str, ...]) -> Iterator[tuple[str, str]]:
        for key, value in branch.items():
            here = (*names, str(key))
            if isinstance(value, dict) and value:
                yield from walk(value, here)
            else:
                yield f"{prefix}.{join(*here)}", ".".join(here)

    yield from walk(below, ())


def show(tree: Any, path: str, kind: str = "text", absent: str | None = None) -> Markup:
    """Formats the value at a path as HTML, with the path in `data-figure` and the value as JSON in `data-value`.

    Args:
      path: path in the tree.
      kind: format, a key of `KINDS`.
      absent: text for a missing value; `not measured` by default for a number, `not known` for another kind.
    """
    from markupsafe import Markup

    value = look_up(tree, path)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is None or not (number or kind in _TEXTS):
        text, state = absent or ("not known" if kind in _TEXTS else "not measured"), "absent"
    else:
        text, state = KINDS[kind](value), "number" if number else "words"
    shown = printable(text, keep="\n")
    return Markup(
        f'<span class="{state}" data-figure="{html.escape(path)}" data-value="{html.escape(json.dumps(value))}">'
        f"{html.escape(shown)}</span>"
    )
