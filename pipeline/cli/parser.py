"""Strict parsing of command-line flags with one-line errors."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from pipeline.cli.main import DEBUG_VARIABLE
from pipeline.cli.parameters import register_flags
from pipeline.errors import UserError
from pipeline.errors.causes import remedy
from pipeline.storage.bucket import check_url, is_url

BY_RECIPE = " (default: from the recipe)"
_EXAMPLES = "examples:"


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help that shows defaults, except of flags whose default is None, and keeps the lines of examples."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith(_EXAMPLES) else super()._fill_text(text, width, indent)


class _Debug(argparse.Action):
    """`--debug`, which `pipeline.cli.main.run_command` handles. It adds no attribute to the flags."""

    def __call__(self, *_: Any) -> None:
        return


class Parser(argparse.ArgumentParser):
    """argparse with errors as UserError, without abbreviated flags, and with `--debug`.

    Args:
      examples: command lines at the end of the help.
      **kwargs: arguments of `argparse.ArgumentParser`.
    """

    def __init__(self, *, examples: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_HelpFormatter, **kwargs)
        self.set_examples(*examples)
        self._groups: dict[str, argparse._ArgumentGroup] = {}
        if self.add_help:
            text = f"Show the traceback behind a one-line error. {DEBUG_VARIABLE}=1 has the same effect."
            self.add_argument("--debug", action=_Debug, nargs=0, default=argparse.SUPPRESS, help=text)

    def error(self, message: str) -> NoReturn:
        """Raises instead of printing usage."""
        raise UserError(f"{message} (--help lists the flags)")

    def set_examples(self, *lines: str) -> None:
        """Replaces the command lines at the end of the help."""
        self.epilog = "\n".join([_EXAMPLES, *(f"  {line}" for line in lines)]) if lines else None

    def group(self, title: str, description: str | None = None) -> argparse._ArgumentGroup:
        """The group of flags with this title, such as "store"; `--help` shows groups in the order of first use."""
        if title not in self._groups:
            self._groups[title] = self.add_argument_group(title, description)
        return self._groups[title]

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Overrides argparse's method; from now on, errors print parameters as these flags."""
        register_flags(self.flag_names())
        return super().parse_known_args(args, namespace)

    def flag_names(self) -> list[str]:
        """Names of all flags, including `--help`."""
        return [name for action in self._actions for name in action.option_strings]

    def refuse(self, unknown: Sequence[str], *, also: Sequence[str] = ()) -> None:
        """Raises UserError for the first unknown argument and suggests the nearest flag, from the parser or `also`."""
        if unknown:
            name = unknown[0].split("=")[0]
            near = difflib.get_close_matches(name, [*self.flag_names(), *also], n=1)
            hint = f"; did you mean {near[0]}?" if near else " (--help lists the flags)"
            raise UserError(f"unknown flag {unknown[0]}{hint}")

    def given(self, argv: Sequence[str]) -> list[str]:
        """Names of the flags in the arguments, without dashes, even if their values are the defaults."""
        unset: list[Any] = []  # a list, since flags that may be repeated append to a copy of it
        names = [action.dest for action in self._actions]
        known, _ = self.parse_known_args(argv, argparse.Namespace(**dict.fromkeys(names, unset)))
        return [name for name in names if getattr(known, name) is not unset]

    def parse_strictly(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parses flags and refuses unknown ones."""
        known, unknown = self.parse_known_args(argv)
        self.refuse(unknown)
        return known


_LARGEST_BATCH = 2**16  # far more than a device can hold; larger sizes overflow inside TensorFlow


def positive(text: str) -> int:
    """argparse type: a whole number, 1 to 2**31 - 1."""
    return _integer(text, at_least=1, at_most=2**31 - 1)


def whole(text: str) -> int:
    """argparse type: a whole number, 0 to 2**63 - 1."""
    return _integer(text, at_least=0, at_most=2**63 - 1)


def batch_size(text: str) -> int:
    """argparse type: a number of views or images per batch, 1 to 65,536."""
    return _integer(text, at_least=1, at_most=_LARGEST_BATCH)


def file_path(text: str) -> str:
    """argparse type: a local path. `~` is the home directory, which shells do not expand after `--flag=`."""
    if not text:
        raise argparse.ArgumentTypeError("empty; expected a path")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # TensorFlow and TFDS require UTF-8
        raise argparse.ArgumentTypeError(f"{text!a}: not UTF-8; rename it, or use another path") from error
    if is_url(text):  # otherwise used as the name of a directory
        raise argparse.ArgumentTypeError(f"{text}: is a URL; expected a local path")
    return str(Path(text).expanduser()) if text.startswith("~") else text


def output_path(text: str) -> Path:
    """argparse type: an output file, checked before the work starts."""
    path = Path(file_path(text))
    try:
        if not path.parent.is_dir():
            raise argparse.ArgumentTypeError(
                f"{path}: the directory {path.parent} does not exist; create it, or use another"
            )
        if (found := find_enclosing(path)) is not None:
            raise argparse.ArgumentTypeError(f"{path}: is inside {found}; use a path outside of it")
        if path.exists() and not path.is_file():  # a device such as /dev/null would be replaced
            raise argparse.ArgumentTypeError(f"{path}: exists and is not a regular file; use another path")
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"{path}: cannot be written ({error.strerror}); {remedy(error.errno)}"
        ) from error
    return path


def place(text: str) -> str:
    """argparse type: a local path, or the URL of a directory in a bucket."""
    if not is_url(text):
        return file_path(text)
    try:
        check_url(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text.rstrip("/")


def seed(text: str) -> int:
    """argparse type: a seed of NumPy's and TensorFlow's global generators, 0 to 2**32 - 1."""
    return _integer(text, at_least=0, at_most=2**32 - 1)


def _integer(text: str, *, at_least: int, at_most: int) -> int:
    try:
        number = int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number") from error
    if number < at_least:
        raise argparse.ArgumentTypeError(f"{text}: expected {at_least} or more")
    if number > at_most:
        raise argparse.ArgumentTypeError(f"{text}: expected {at_most} or less")
    return number


def number(text: str) -> float:
    """argparse type: a finite number, 0 or more."""
    return _finite(text, positive=False)


def positive_number(text: str) -> float:
    """argparse type: a finite number above 0."""
    return _finite(text, positive=True)


def _finite(text: str, *, positive: bool) -> float:
    try:
        found = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: expected a number") from error
    if not math.isfinite(found) or found < 0 or (positive and not found):
        raise argparse.ArgumentTypeError(
            f"{text}: expected a finite number{' above 0' if positive else ', 0 or more'}"
        )
    return found


# Marker files of directories whose files are all counted or fingerprinted.
_COMPLETE = {
    "spec.json": "a store",
    "saved_model.pb": "a SavedModel",
    "dataset_info.json": "a prepared data set",
}


def find_enclosing(path: Path, *, replaceable: str | None = None) -> str | None:
    """Describes the store, SavedModel or prepared data set that contains a path, with links resolved; None if there is none.

    Args:
      path: file or directory to write.
      replaceable: marker file of a directory that may be written itself, such as `spec.json` of a store.
    """
    place = path.resolve()
    # A store is also a prepared data set.
    is_replaced = replaceable is not None and (place / replaceable).is_file()
    for name, what in _COMPLETE.items():
        for parent in place.parents if is_replaced or name == replaceable else (place, *place.parents):
            with contextlib.suppress(OSError):  # a name that is too long is reported when it is written
                if (parent / name).is_file():
                    return f"{what}, {parent}"
    return None


def check_outside(path: Path, *, flag: str, replaceable: str | None = None) -> None:
    """Refuses to write into a store, a SavedModel or a prepared data set.

    Args:
      path: directory to write.
      flag: flag that names it.
      replaceable: see `find_enclosing`.

    Raises:
      UserError: the path is inside one.
    """
    if (found := find_enclosing(path, replaceable=replaceable)) is not None:
        raise UserError(f"{flag}={path}: is inside {found}; use a directory outside of it")


def make_directory(path: Path, *, flag: str, replaceable: str | None = None) -> Path:
    """Creates a directory with its parents, and checks that it is writable.

    Args:
      flag: flag that names it.
      replaceable: see `find_enclosing`.

    Raises:
      UserError: a file has that path, the directory cannot be created or written, or it is inside a store, SavedModel or data set.
    """
    check_outside(path, flag=flag, replaceable=replaceable)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{flag}={path}: is a file, or inside a file; expected a directory") from error
    except OSError as error:
        raise UserError(
            f"{flag}={path}: cannot be created ({error.strerror}: {error.filename}); "
            f"{remedy(error.errno, otherwise='use another directory')}"
        ) from error
    try:
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UserError(
            f"{flag}={path}: cannot be written ({error.strerror}); {remedy(error.errno)}"
        ) from error
    return path


def check_model(flag: str, place: str | None) -> None:
    """Checks that a local path is a SavedModel or a .keras file, by its names. A URL is checked when it is opened.

    Raises:
      UserError: it is neither.
    """
    check_exists(flag, place)
    if place is None or is_url(place):
        return
    path = Path(place)
    if path.is_dir() and not (path / "saved_model.pb").exists():
        raise UserError(f"{flag}={place}: expected a SavedModel, but it has no saved_model.pb")
    if path.is_file() and path.suffix != ".keras":
        raise UserError(f"{flag}={place}: expected a SavedModel directory or a .keras file")


def check_exists(flag: str, place: str | None) -> None:
    """Checks that the local path of a flag exists. A URL is checked when it is opened.

    Raises:
      UserError: the path does not exist.
    """
    if place is not None and not is_url(place) and not Path(place).exists():
        raise UserError(f"{flag}={place}: no such file or directory")
