"""Apache Beam's flags, read from the source of the installed Beam: importing it takes seconds.

Only for early answers to mistakes. `pipeline.precompute` asks Beam itself afterwards, which also knows the options of
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
    """Refuses what neither this project nor Beam knows.

    Args:
      arguments: that are not ours.
      ours: our flags, for the nearest name.

    Raises:
      UserError: Beam is not installed, or a runner, a flag or a value is unknown.
    """
    name = runner_name(arguments)
    path = runner_path(name)
    if not path.startswith("apache_beam."):
        return  # somebody else's runner, which may bring options of its own
    parser = make_parser(path)
    _, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        ours.refuse(unknown, also=parser.flag_names())


def runner_name(arguments: Sequence[str]) -> str:
    """The runner as `--runner` names it."""
    parser = Parser(prog="beam", add_help=False)
    parser.add_argument("--runner", default=DEFAULT_RUNNER)
    name: str = parser.parse_known_args(list(arguments))[0].runner
    return name


def runner_path(name: str) -> str:
    """The full name of a runner's class, as Beam's `create_runner` finds it.

    Raises:
      UserError: there is no such runner.
    """
    known = {path.rsplit(".", 1)[-1]: path for path in _known_runners()}
    lower = {short.lower(): path for short, path in known.items()}
    path = lower.get(name.lower()) or lower.get(f"{name.lower()}runner") or name
    if "." not in path:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}"
        raise UserError(f"--runner={name}: no such runner; {hint} (or the full name of a runner's class)")
    if path.startswith("apache_beam.") and not _source(path).exists():
        raise UserError(f"--runner={name}: the installed Beam has no such runner")
    return path


def make_parser(path: str) -> Parser:
    """A parser of Beam's flags, and of those of the runner at `path`; values keep their text where Beam computes them."""
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
    """The file of a class of Beam's."""
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
    """The names and keywords of each `parser.add_argument(...)` in the `_add_argparse_args` of a source."""
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
    """What decides how many values a flag takes, and which."""
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
