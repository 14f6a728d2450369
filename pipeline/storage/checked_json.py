"""Builds dataclasses and typed dicts from parsed JSON, and rejects anything with another shape.

All metadata files are parsed here. Annotations declare what a file may contain. A dataclass takes exactly its fields, except
those with `json: False` in their metadata, and validates them in `__post_init__`. A field with `build` in its metadata is built by
that function of (tree, path). A `TypedDict` declares the keys that are read; other keys are kept, so a later version may add some.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import math
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union

from pipeline.errors import UserError

T = TypeVar("T")

# Limits of texts (paths, command lines) and numbers (bytes) in metadata files.
MAX_TEXT = 1 << 16
MAX_NUMBER = (1 << 63) - 1


@dataclasses.dataclass(frozen=True)
class AtLeast:
    """Lower bound of a number, as in `Annotated[int, AtLeast(1)]`."""

    low: float


Count = Annotated[int, AtLeast(0)]
Positive = Annotated[int, AtLeast(1)]


class ShapeError(ValueError):
    """A value does not match its annotation, is missing, unknown, or out of range."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path}: {problem}" if path else problem)


def build(kind: type[T], tree: Any, *, path: str = "") -> T:
    """A value of type `kind` from a JSON tree.

    Args:
      kind: a dataclass, a `TypedDict`, `str`, `int`, `float`, `bool`, `None`, `Any`, an `Annotated` number with `AtLeast`, or a
        union, `Literal`, `list`, `tuple` (`tuple[X, ...]`) or `dict[str, X]` of these. A `float` also takes whole numbers and
        does not convert them, since digests are computed from the file's content.
      tree: result of `parse_json`.
      path: path of the tree in its file, for errors, such as `identity.teacher`.

    Raises:
      ShapeError: a value has another shape; the message names the field, the value and what was expected.
    """
    value: T = _build(kind, tree, path)
    return value


def _build(kind: Any, tree: Any, path: str) -> Any:
    if kind is Any:
        return tree
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, tree, path)
    if typing.is_typeddict(kind):
        return _typed_dict(kind, tree, path)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.NotRequired:
        return _build(arguments[0], tree, path)
    if origin is Annotated:
        value = _build(arguments[0], tree, path)
        if value < (low := arguments[1].low):
            raise ShapeError(path, f"expected {low:g} or more, got {_shown(value)}")
        return value
    if origin in (Union, types.UnionType):
        return _union(arguments, tree, path)
    if origin is Literal:
        if type(tree) is str and tree in arguments:
            return tree
        raise ShapeError(path, f"expected one of {', '.join(map(str, arguments))}, got {_shown(tree)}")
    if origin in (list, tuple):
        items = _expect(list, tree, path)
        if origin is tuple and arguments[-1] is not Ellipsis and len(items) != len(arguments):
            raise ShapeError(path, f"expected {len(arguments)} values, got {len(items)}")
        return origin(_build(arguments[0], item, f"{path}[{i}]") for i, item in enumerate(items))
    if origin is dict:
        found = _expect(dict, tree, path)
        return {name: _build(arguments[1], item, _join(path, name)) for name, item in found.items()}
    return _scalar(kind, tree, path)


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


@functools.cache
def _required(kind: Any) -> frozenset[str]:
    """Required keys of a `TypedDict`. Its own list misses `NotRequired` in postponed annotations."""
    hints = _hints(kind)
    return frozenset(
        name for name in kind.__required_keys__ if typing.get_origin(hints[name]) is not typing.NotRequired
    )


def _dataclass(kind: Any, tree: Any, path: str) -> Any:
    found = _expect(dict, tree, path)
    hints = _hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind) if field.metadata.get("json", True)}
    for name in found:
        if name not in fields:
            raise ShapeError(_join(path, name), f"unknown; expected {', '.join(fields)}")
    for name, field in fields.items():
        optional = (field.default, field.default_factory) != (dataclasses.MISSING, dataclasses.MISSING)
        if name not in found and not optional:
            raise ShapeError(_join(path, name), "missing")
    values = {}
    for name, value in found.items():
        own: Callable[..., Any] = fields[name].metadata.get("build", functools.partial(build, hints[name]))
        values[name] = own(value, path=_join(path, name))
    try:
        return kind(**values)
    except ShapeError:
        raise
    except (UserError, ValueError, TypeError) as error:  # from `__post_init__`
        raise ShapeError(path, str(error)) from error


def _typed_dict(kind: Any, tree: Any, path: str) -> dict[str, Any]:
    found = _expect(dict, tree, path)
    for name in _required(kind):
        if name not in found:
            raise ShapeError(_join(path, name), "missing")
    hints = _hints(kind)
    return {
        name: _build(hints[name], value, _join(path, name)) if name in hints else value
        for name, value in found.items()
    }


def _union(kinds: tuple[Any, ...], tree: Any, path: str) -> Any:
    """The value of the first kind that matches the tree; errors are those of the last kind."""
    if tree is None and type(None) in kinds:
        return None
    kinds = tuple(kind for kind in kinds if kind is not type(None))
    for kind in kinds[:-1]:
        try:
            return _build(kind, tree, path)
        except ShapeError:
            continue
    return _build(kinds[-1], tree, path)


def _scalar(kind: Any, tree: Any, path: str) -> Any:
    if kind is float and type(tree) in (int, float):
        # An integer may be too large for a float.
        if abs(tree) <= MAX_NUMBER if type(tree) is int else math.isfinite(tree):
            return tree
        raise ShapeError(path, f"expected a finite number, got {_shown(tree)}")
    value = _expect(kind, tree, path)
    if kind is str and (len(value) > MAX_TEXT or "\0" in value):
        raise ShapeError(
            path, f"expected text of at most {MAX_TEXT:,} characters, without NUL, got {_shown(tree)}"
        )
    if kind is int and abs(value) > MAX_NUMBER:
        raise ShapeError(path, f"expected a whole number of at most 2**63, got {_shown(tree)}")
    return value


_NAMES = {
    dict: "an object",
    list: "a list",
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
}


def _expect(kind: type[T], tree: Any, path: str) -> T:
    """The tree, if its type is exactly `kind` (True is not a number)."""
    if type(tree) is not kind:
        raise ShapeError(path, f"expected {_NAMES.get(kind, kind.__name__)}, got {_shown(tree)}")
    value: T = tree
    return value


def _join(path: str, name: str) -> str:
    return f"{path}.{name:.100}" if path else f"{name:.100}"


def _shown(tree: Any) -> str:
    """A value as errors show it: short, on one line."""
    if isinstance(tree, Mapping | list):
        return _NAMES[dict if isinstance(tree, Mapping) else list]
    if type(tree) is int and abs(tree) > 10**100:  # Python refuses to print longer ones
        return "a number of more than 100 digits"
    text = repr(tree)
    return text if len(text) <= 100 else f"{text[:100]}..."


def read_text(path: Path, *, limit: int) -> str:
    """Text of a file.

    Args:
      limit: maximum size in bytes.

    Raises:
      OSError: the file does not exist, is not a regular file, or cannot be read.
      ValueError: the file is longer, or not UTF-8.
    """
    if path.exists() and not path.is_file():  # reading a pipe might never end
        raise OSError(errno.EINVAL, "not a file", str(path))
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"longer than {limit:,} bytes")
    return data.decode()


def parse_json(text: str) -> Any:
    """Parses JSON strictly, without NaN and infinities.

    Raises:
      ValueError: the text is not JSON, or nested too deeply.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_json(path: Path, *, limit: int) -> Any:
    """Parses a JSON file; raises what `read_text` and `parse_json` raise."""
    return parse_json(read_text(path, limit=limit))


def scalars(tree: Any, *, nested: int = 0) -> dict[str, Any]:
    """A mapping of names to strings and numbers, and to such mappings up to `nested` levels deep.

    Raises:
      TypeError: the tree has another shape.
    """
    if not isinstance(tree, Mapping):
        raise TypeError(f"expected an object, got {type(tree).__name__}")
    for name, value in tree.items():
        if isinstance(value, Mapping) and nested:
            scalars(value, nested=nested - 1)
        elif not (value is None or isinstance(value, str | int | float)):
            raise TypeError(f"{name}: expected a string or a number, got {type(value).__name__}")
    return dict(tree)


def is_whole(value: object, low: int, high: int) -> bool:
    """Whether a value is an int, not just equal to one, in `low .. high`."""
    return type(value) is int and low <= value <= high
