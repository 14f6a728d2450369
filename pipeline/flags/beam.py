"""Apache Beam's flags, parsed from the source of the installed Beam, because importing Beam takes seconds.

This is for early errors only. `pipeline.precompute` parses the flags with Beam afterwards, which also knows the options of
runners outside of its package.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.cli.parser import Parser
from pipeline.errors import UserError

DEFAULT_RUNNER = "DirectRunner"
LOCAL_RUNNERS = (
    "BundleBasedDirectRunner",
    "DirectRunner",
    "FnApiRunner",
    "PrismRunner",
    "SwitchingDirectRunner",
)
_OPTIONS = Path("options", "pipeline_options.py")
_ADDS = ("add_argument", "add_value_provider_argument")
_TYPES = {"int": int, "float": float}


def check(arguments: Sequence[str], ours: Parser) -> None:
    """Refuses arguments that neither this project nor Beam knows.

    Args:
      arguments: arguments that are not flags of this project.
      ours: parser of this project's flags, for the nearest name in errors.

    Raises:
      UserError: Beam is not installed, or a runner, a flag or a value is unknown.
    """
    name = runner_name(arguments)
    path = runner_path(name)
    if not path.startswith("apache_beam."):
        return  # an external runner may have its own options
    parser = make_parser(path)
    _, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        ours.refuse(unknown, also=parser.flag_names())


def runner_name(arguments: Sequence[str]) -> str:
    """The value of `--runner`."""
    parser = Parser(prog="beam", add_help=False)
    parser.add_argument("--runner", default=DEFAULT_RUNNER)
    name: str = parser.parse_known_args(list(arguments))[0].runner
    return name


def runner_path(name: str) -> str:
    """Resolves the full name of a runner's class in the same way as Beam's `create_runner`.

    Raises:
      UserError: the runner is unknown.
    """
    known = {path.rsplit(".", 1)[-1]: path for path in _known_runners()}
    lower = {short.lower(): path for short, path in known.items()}
    path = lower.get(name.lower()) or lower.get(f"{name.lower()}runner") or name
    if "." not in path:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}"
        raise UserError(f"--runner={name}: unknown runner; {hint} (or the full name of a class)")
    if path.startswith("apache_beam.") and not _source(path).exists():
        raise UserError(f"--runner={name}: not in the installed Beam; use another runner")
    return path


def make_parser(path: str) -> Parser:
    """Makes a parser of Beam's flags and those of the runner at `path`. Values that Beam converts stay text."""
    parser = Parser(prog="beam", add_help=False, conflict_handler="resolve")
    for source in (_directory() / _OPTIONS, _source(path)):
        for names, keywords in _arguments(source):
            parser.add_argument(*names, **keywords)
    return parser


@functools.cache
def _directory() -> Path:
    found = importlib.util.find_spec("apache_beam")
    if found is None or found.origin is None:
        raise UserError("Apache Beam is not installed: pip install 'view-distill[beam]'")
    return Path(found.origin).parent


def _source(path: str) -> Path:
    """Source file of a class in Beam."""
    module = _directory().joinpath(*path.split(".")[1:-1])
    return module / "__init__.py" if module.is_dir() else module.with_suffix(".py")


@functools.cache
def _tree(source: Path) -> ast.Module:
    return ast.parse(source.read_text())


def _known_runners() -> tuple[str, ...]:
    for node in ast.walk(_tree(_directory() / _OPTIONS)):
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and node.targets[0].id == "ALL_KNOWN_RUNNERS"
        ):
            return tuple(ast.literal_eval(node.value))
    return ()


def _arguments(source: Path) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """Yields names and keywords of each `parser.add_argument(...)` in the `_add_argparse_args` functions of a source."""
    for function in ast.walk(_tree(source)):
        if not isinstance(function, ast.FunctionDef) or function.name != "_add_argparse_args":
            continue
        for call in ast.walk(function):
            if (
                isinstance(call, ast.Call)
                and isinstance(call.func, ast.Attribute)
                and call.func.attr in _ADDS
            ):
                names = [str(arg.value) for arg in call.args if isinstance(arg, ast.Constant)]
                yield names, _keywords(call)


def _keywords(call: ast.Call) -> dict[str, Any]:
    """Extracts the keywords that determine number and kind of a flag's values."""
    out: dict[str, Any] = {}
    for keyword in call.keywords:
        if keyword.arg == "type" and isinstance(keyword.value, ast.Name) and keyword.value.id in _TYPES:
            out["type"] = _TYPES[keyword.value.id]
        elif keyword.arg in ("action", "nargs", "choices"):
            try:
                out[keyword.arg] = ast.literal_eval(keyword.value)
            except ValueError:  # computed by Beam
                continue
    if out.get("action") in ("store_const", "append_const"):
        out["const"] = True
    return out
