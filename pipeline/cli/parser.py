"""Command-line flags, parsed strictly: an unknown one is a mistake, and a mistake is one line."""

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
    """`--debug`, which `pipeline.cli.main.run_command` looks for; it leaves no attribute in the flags."""

    def __call__(self, *_: Any) -> None:
        return


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, as UserError, no abbreviated flags, and `--debug` beside `--help`.

    Args:
      examples: command lines at the end of the help.
      **kwargs: of `argparse.ArgumentParser`.
    """

    def __init__(self, *, examples: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_HelpFormatter, **kwargs)
        self.set_examples(*examples)
        self._groups: dict[str, argparse._ArgumentGroup] = {}
        if self.add_help:
            text = f"show the traceback behind a one-line error; as does {DEBUG_VARIABLE}=1"
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
        """As argparse's; errors print parameters as these flags from now on."""
        register_flags(self.flag_names())
        return super().parse_known_args(args, namespace)

    def flag_names(self) -> list[str]:
        """All flags, `--help` included."""
        return [name for action in self._actions for name in action.option_strings]

    def refuse(self, unknown: Sequence[str], *, also: Sequence[str] = ()) -> None:
        """Raises UserError for the first unknown argument, with the nearest flag, of ours or `also`."""
        if unknown:
            name = unknown[0].split("=")[0]
            near = difflib.get_close_matches(name, [*self.flag_names(), *also], n=1)
            hint = f"; did you mean {near[0]}?" if near else " (--help lists the flags)"
            raise UserError(f"unknown flag {unknown[0]}{hint}")

    def given(self, argv: Sequence[str]) -> list[str]:
        """Names of the flags that the arguments give, without dashes, whether or not their values are the defaults."""
        unset = object()
        names = [action.dest for action in self._actions]
        known, _ = self.parse_known_args(argv, argparse.Namespace(**dict.fromkeys(names, unset)))
        return [name for name in names if getattr(known, name) is not unset]

    def parse_strictly(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parses flags; an unknown one is an error that names the nearest."""
        known, unknown = self.parse_known_args(argv)
        self.refuse(unknown)
        return known


_LARGEST_BATCH = 2**16  # far more than any device holds; beyond, TensorFlow's own counts overflow somewhere


def positive(text: str) -> int:
    """argparse type: a whole number, 1 to 2**31 - 1."""
    return _integer(text, at_least=1, at_most=2**31 - 1)


def whole(text: str) -> int:
    """argparse type: a whole number, 0 to 2**63 - 1."""
    return _integer(text, at_least=0, at_most=2**63 - 1)


def batch_size(text: str) -> int:
    """argparse type: a number of views or images at a time, 1 to 65,536."""
    return _integer(text, at_least=1, at_most=_LARGEST_BATCH)


def file_path(text: str) -> str:
    """argparse type: a path; `~` is the home directory, which shells leave alone after `--flag=`."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, got nothing")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # TensorFlow and TFDS take no other path
        raise argparse.ArgumentTypeError(f"{text!a}: not UTF-8; rename it, or name another path") from error
    if is_url(text):  # it would be taken for a directory of that name
        raise argparse.ArgumentTypeError(f"{text} is a URL; expected a path of this machine")
    return str(Path(text).expanduser()) if text.startswith("~") else text


def output_path(text: str) -> Path:
    """argparse type: a file to be written, so that what it cannot be is said before the work and not after it."""
    path = Path(file_path(text))
    try:
        if not path.parent.is_dir():
            raise argparse.ArgumentTypeError(f"{path}: no directory {path.parent}; make it, or name another")
        if (found := find_enclosing(path)) is not None:
            raise argparse.ArgumentTypeError(f"{path}: is inside {found}; name a place outside of it")
        if path.exists() and not path.is_file():  # a device such as /dev/null would be replaced
            raise argparse.ArgumentTypeError(f"{path}: is there, and not a file; name another")
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"{path}: cannot be written ({error.strerror}); {remedy(error.errno)}"
        ) from error
    return path


def place(text: str) -> str:
    """argparse type: a path, or the URL of a directory in a bucket."""
    if not is_url(text):
        return file_path(text)
    try:
        check_url(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text.rstrip("/")


def seed(text: str) -> int:
    """argparse type: what NumPy's and TensorFlow's global generators take as a seed, 0 to 2**32 - 1."""
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


# Files by which a directory is known whose files are all counted or fingerprinted.
_WHOLE = {
    "spec.json": "a store",
    "saved_model.pb": "a SavedModel",
    "dataset_info.json": "a prepared data set",
}


def find_enclosing(path: Path, *, replaceable: str | None = None) -> str | None:
    """Describes the store, SavedModel or prepared data set that a path is or lies in, links followed; None if there is none.

    Args:
      path: a file or directory to be written.
      replaceable: the file in a directory that may be written itself, such as `spec.json` in a store.
    """
    place = path.resolve()
    # A store is a prepared data set, too.
    is_replaced = replaceable is not None and (place / replaceable).is_file()
    for name, what in _WHOLE.items():
        for parent in place.parents if is_replaced or name == replaceable else (place, *place.parents):
            with contextlib.suppress(OSError):  # too long a name, which is reported when it is written
                if (parent / name).is_file():
                    return f"{what}, {parent}"
    return None


def check_outside(path: Path, *, flag: str, replaceable: str | None = None) -> None:
    """Refuses to write into a store, a SavedModel or a prepared data set, all of whose files count.

    Args:
      path: directory to be written.
      flag: that names it.
      replaceable: see `find_enclosing`.

    Raises:
      UserError: the path is or lies in one.
    """
    if (found := find_enclosing(path, replaceable=replaceable)) is not None:
        raise UserError(f"{flag}={path}: is inside {found}; name a directory outside of it")


def make_directory(path: Path, *, flag: str, replaceable: str | None = None) -> Path:
    """Makes the directory that a flag names, with its parents, and checks that it can be written.

    Args:
      path: of the directory.
      flag: that names it.
      replaceable: see `find_enclosing`.

    Raises:
      UserError: a file is in the way, it cannot be made or written, or it lies in a store, SavedModel or data set.
    """
    check_outside(path, flag=flag, replaceable=replaceable)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{flag}={path}: a file is in the way; name a directory") from error
    except OSError as error:
        raise UserError(
            f"{flag}={path}: cannot be made ({error.strerror}: {error.filename}); "
            f"{remedy(error.errno, otherwise='name another directory')}"
        ) from error
    try:
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UserError(
            f"{flag}={path}: cannot be written ({error.strerror}); {remedy(error.errno)}"
        ) from error
    return path


def check_exists(flag: str, place: str | None) -> None:
    """Checks a path of this machine that a flag names; a URL is checked when it is opened.

    Raises:
      UserError: there is nothing.
    """
    if place is not None and not is_url(place) and not Path(place).exists():
        raise UserError(f"{flag}={place}: no such file or directory")
