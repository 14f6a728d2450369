"""Figures of a result as HTML: formatted for a reader, with the place they are from and their exact value."""

from __future__ import annotations

import datetime
import html
import json
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from pipeline.errors.text import printable

if TYPE_CHECKING:
    from markupsafe import Markup

_TIMES = "\N{MULTIPLICATION SIGN}"
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_TEXTS = ("text", "seeds", "date", "digest", "command")  # kinds that take anything


def _minus(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")


def _points(value: float) -> str:
    """Percentage points, signed unless they round to 0."""
    text = f"{100 * value:+.2f}"
    return "0.00" if float(text) == 0 else _minus(text)


def _three_digits(value: float) -> str:
    """Three significant digits of a number from 0.0001 to 10^6, never as a power of ten."""
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 1000 else f"{rounded:.3g}"


def number_text(value: float) -> str:
    """Three significant digits; powers of ten where there would be many zeros."""
    if value == 0:
        return "0"
    if isinstance(value, int) or (1000 <= abs(value) < 1e6):
        return _minus(f"{value:,.0f}")
    if 1e-3 <= abs(value) < 1000:
        return _minus(_three_digits(value))
    digits, power = f"{value:.2e}".split("e")
    return f"{_minus(digits)}\N{NO-BREAK SPACE}{_TIMES}\N{NO-BREAK SPACE}10{str(int(power)).translate(_SUPERSCRIPTS)}"


def duration_text(seconds: float) -> str:
    """Milliseconds to hours."""
    if 0 < seconds < 1:
        return f"{_three_digits(1e3 * seconds)} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def bytes_text(value: float) -> str:
    """Decimal units."""
    for unit, power in (("TB", 12), ("GB", 9), ("MB", 6), ("kB", 3)):
        if value >= 10**power:
            return f"{_three_digits(value / 10**power)} {unit}"
    return f"{value:,.0f} B"


_ROUNDING = 1e-14  # of a mean KL: sums of differences of float64 logarithms


def _without_rounding(kl: float) -> float:
    """A mean KL; 0 where it is nothing but rounding, which may be below 0."""
    return 0.0 if kl < _ROUNDING else kl


def kl_text(nats: float) -> str:
    """A mean KL for a terminal."""
    return f"{nats:.1e}" if _without_rounding(nats) else "0"


def error_text(value: float) -> str:
    """An absolute error for a terminal."""
    return _three_digits(value) if value >= 1e-3 else f"{value:.2g}"


def codec_cost_text(codec: str, *, mean_kl: float, max_logit_error: float, temperature: float) -> str:
    """What a codec costs, in one line for a terminal."""
    text = f"{codec}: mean KL {kl_text(mean_kl)} nats at T = {temperature:g}, "
    error = error_text(max_logit_error)
    if (kept := kept_logits(codec)) is None:
        return f"{text}largest logit error {error}"
    return (
        f"{text}which is its whole cost; it keeps the {kept:,} largest logits and the sum of the others, which differ "
        f"from their mean by up to {error}, as intended"
    )


def kept_logits(codec: str) -> int | None:
    """K of a codec `topk:K`, which keeps no other logit; else None."""
    name, _, count = codec.partition(":")
    return int(count) if name == "topk" and count.isdecimal() else None


def _seeds_text(seeds: list[Any]) -> str:
    """How many runs, and their seeds."""
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
    "kl": lambda value: number_text(_without_rounding(value)),
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
    """A path of names; a dot that is part of a name is escaped."""
    return ".".join(str(name).replace(".", "\\.") for name in names)


def look_up(tree: Any, path: str) -> Any:
    """What is at a path such as `runs.0.top1`; None where there is nothing."""
    for name in re.split(r"(?<!\\)\.", path):
        if isinstance(tree, list):
            tree = tree[int(name)] if int(name) < len(tree) else None
        elif isinstance(tree, dict):
            tree = tree.get(name.replace("\\.", "."))
        else:
            return None
    return tree


def leaves(tree: Any, prefix: str) -> Iterator[tuple[str, str]]:
    """(path, name) of everything below `prefix` in a tree of dicts; names are relative and dotted."""
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
    """The figure at a path, for a page: escaped, with the path in `data-figure` and its JSON in `data-value`.

    Args:
      tree: of result.json.
      path: in it.
      kind: one of `KINDS`: how a reader sees it.
      absent: what is said where there is nothing, or no number where one is due; by default `not measured` of a
        number and `not known` of anything else.
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
