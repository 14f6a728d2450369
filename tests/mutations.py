"""JSON trees with one field, or several, removed, retyped, nested, or blown up."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import resource
import sys
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from pipeline.errors.text import is_printable

FAST = settings(
    max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None
)
THOROUGH = settings(FAST, max_examples=5000, derandomize=False, print_blob=True)

Path = tuple[str | int, ...]
Change = Callable[[Any], Any]

# Every kind of character that a terminal obeys: ANSI, line ends, C1, bidirectional, zero width, separators, surrogates.
CONTROLS = "\x1b[2J\x1b]0;title\x07\r\n\tok\x9b31m\u202e\u2066\u200b\u2028\ufeff\ud800\x7f"
_NESTED: Any = []
for _ in range(400):
    _NESTED = [_NESTED]

REMOVED = object()
CHANGES: dict[str, Change] = {
    "removed": lambda value: REMOVED,
    "null": lambda value: None,
    "true": lambda value: True,
    "false": lambda value: False,
    "zero": lambda value: 0,
    "minus one": lambda value: -1,
    "half": lambda value: 0.5,
    "large": lambda value: 2**31,
    "2**63": lambda value: 2**63,
    "10**30": lambda value: 10**30,
    "10**400": lambda value: 10**400,
    "1e308": lambda value: 1e308,
    "tiny": lambda value: 5e-324,
    "empty text": lambda value: "",
    "other text": lambda value: "other",
    "long text": lambda value: "x" * 200_000,
    "as text": lambda value: str(value)[:10_000],
    "as number": lambda value: int(value) if isinstance(value, str) and value.isdigit() else 7,
    "path": lambda value: "../../../etc/passwd",
    "long path": lambda value: "/" + "y" * 4000,
    "NUL": lambda value: "a\0b",
    "controls": lambda value: CONTROLS,
    "controls added": lambda value: value + CONTROLS if isinstance(value, str) else CONTROLS,
    "surrogate": lambda value: "\udc80",
    "percent": lambda value: "%s %(x)d {0} {x} {{",
    "empty list": lambda value: [],
    "empty object": lambda value: {},
    "in a list": lambda value: [value],
    "in an object": lambda value: {"value": value},
    "in itself": lambda value: {**value, "again": value} if isinstance(value, dict) else [value, value],
    "nested": lambda value: _NESTED,
    "repeated": lambda value: (value if isinstance(value, list) and value else [value]) * 1000,
    "unknown key": lambda value: (
        {**value, CONTROLS: CONTROLS} if isinstance(value, dict) else {CONTROLS: value}
    ),
    "doubled": lambda value: value * 2 if isinstance(value, int | float | str | list) else value,
    "negative": lambda value: -value if isinstance(value, int | float) else value,
}

ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(), max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def places(tree: Any, here: Path = ()) -> Iterator[Path]:
    """The path of every value in a tree, the tree's own first."""
    yield here
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from places(value, (*here, name))
    elif isinstance(tree, list):
        for number, value in enumerate(tree):
            yield from places(value, (*here, number))


def changed(tree: Any, path: Path, change: Change) -> Any:
    """A copy of the tree with the value at `path` changed; the tree itself where there is no such value any more."""
    if not path:
        value = change(tree)
        return {} if value is REMOVED else value
    out = copy.copy(tree)
    try:
        value = changed(tree[path[0]], path[1:], change) if path[1:] else change(tree[path[0]])
        if value is REMOVED:
            del out[path[0]]
        else:
            out[path[0]] = value
    except (KeyError, IndexError, TypeError):  # an earlier change took it away
        return tree
    return out


@st.composite
def mutations(draw: st.DrawFn, trees: dict[str, Any]) -> dict[str, Any]:
    """Some of the trees, by name, changed in one to three places."""
    out: dict[str, Any] = {}
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(trees)))
        tree = out.get(name, trees[name])
        path = draw(st.sampled_from(list(places(trees[name]))))
        change = draw(
            st.sampled_from(list(CHANGES.values()))
            | ANYTHING.map(lambda value: lambda old, value=value: value)
        )
        out[name] = changed(tree, path, change)
    return out


def every_mutation(trees: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each change of each value of each tree, with a name for it."""
    for name, tree in trees.items():
        for path in places(tree):
            for what, change in CHANGES.items():
                yield f"{name} {'.'.join(map(str, path))} {what}", {name: changed(tree, path, change)}


def dumps(tree: Any) -> bytes:
    """As a hostile writer would: longer than Python's limit of digits, and with lone surrogates escaped."""
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(tree).encode()
    finally:
        sys.set_int_max_str_digits(limit)


@contextlib.contextmanager
def bounded_memory(most: int = 500 << 20) -> Iterator[None]:
    """Nothing in it makes this process larger by more than `most` bytes."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    assert grown < most, f"{grown:,} bytes more"


@contextlib.contextmanager
def printable_output() -> Iterator[None]:
    """What is printed in it holds nothing that a terminal obeys, but for the ends of our own lines."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        yield
    text = out.getvalue()
    assert CONTROLS[:4] not in text
    assert is_printable(text.replace("\n", "").replace("\r", "").replace("\x1b[A", "")), repr(text)
    assert "ok" not in text.splitlines(), repr(text)  # the line that `CONTROLS` would make
