"""The files of `--class_names` and `--class_map`, and what their lines mean for a teacher and a data set."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from pipeline.cli.choices import check_class_name
from pipeline.errors import UserError
from pipeline.errors.text import is_printable
from pipeline.store.layout import CLASSES_LIMIT


def _read_lines(path: str, *, flag: str) -> list[str]:
    """Lines of a text file.

    Raises:
      UserError: the file cannot be read, is too large, is not UTF-8, or has unprintable characters; names the line.
    """
    try:
        data = Path(path).read_bytes() if Path(path).stat().st_size <= CLASSES_LIMIT else None
        if data is None:
            raise UserError(f"{flag}={path}: larger than {CLASSES_LIMIT:,} bytes; expected a list of classes")
        lines = data.decode("utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(f"{flag}={path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{flag}={path}: is not UTF-8 text ({error}); save it as UTF-8") from error
    for number, line in enumerate(lines, 1):
        if not is_printable(line.replace("\t", " ")):
            raise UserError(f"{flag}={path}, line {number}: {line!a:.100}: has unprintable characters")
    return lines


def read_class_names(path: str) -> tuple[str, ...]:
    """The class names in a file, one per line.

    Raises:
      UserError: the file cannot be read, or a line is not a name.
    """
    lines = [line.strip() for line in _read_lines(path, flag="--class_names")]
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise UserError(f"--class_names={path}: is empty; expected the name of one class per line")
    for number, line in enumerate(lines, 1):
        try:
            check_class_name(line)
        except UserError as error:
            raise UserError(f"--class_names={path}, line {number}: {error}") from error
    return tuple(lines)


@dataclasses.dataclass(frozen=True)
class MapRow:
    """A line of a class map.

    Attributes:
      line: its number in the file, from 1.
      teacher: the teacher's class, by name or by index.
      label: class of the data set, by name or by index.
    """

    line: int
    teacher: str
    label: str


def read_class_map(path: str) -> tuple[MapRow, ...]:
    """The rows of a CSV file of a teacher class and a class of the data set per line, without a header.

    Raises:
      UserError: the file cannot be read, or a line has not two values.
    """
    rows, reader = [], csv.reader(_read_lines(path, flag="--class_map"), strict=True)
    try:
        for values in reader:
            cells = [value.strip() for value in values]
            if not any(cells):
                continue
            if len(cells) != 2 or not all(cells):
                raise UserError(
                    f"--class_map={path}, line {reader.line_num}: {','.join(values)!r:.100}: expected two values, a teacher class and "
                    "a class of the data set, such as 281,cat"
                )
            rows.append(MapRow(reader.line_num, *cells))
    except csv.Error as error:
        raise UserError(f"--class_map={path}, line {reader.line_num}: is not CSV ({error})") from error
    if not rows:
        raise UserError(
            f"--class_map={path}: is empty; expected a teacher class and a class of the data set per line"
        )
    return tuple(rows)


def resolve_class_map(
    path: str,
    rows: Sequence[MapRow],
    *,
    num_classes: int,
    class_names: Sequence[str] | None,
    labels: Sequence[str],
) -> tuple[tuple[int, int], ...]:
    """The pairs of a class map by index.

    Args:
      path: the file, for errors.
      rows: its rows.
      num_classes: C.
      class_names: names of the teacher's classes; None if they are not known.
      labels: names of the classes of the data set.

    Returns:
      Teacher class and class of the data set, ascending by teacher class.

    Raises:
      UserError: a value is no class, a name is ambiguous, or a teacher class is listed twice; names file, line and value.
    """
    teacher = _indices(path, rows, "teacher", names=class_names, count=num_classes)
    label = _indices(path, rows, "label", names=labels, count=len(labels))
    first: dict[int, int] = {}
    for row, number in zip(rows, teacher, strict=True):
        if (line := first.setdefault(number, row.line)) != row.line:
            raise UserError(
                f"--class_map={path}, line {row.line}: {row.teacher}: this teacher class is on line {line} already; list it once"
            )
    return tuple(sorted(zip(teacher, label, strict=True)))


_WHAT = {"teacher": "class of the teacher", "label": "class of the data set"}


def _indices(
    path: str, rows: Sequence[MapRow], column: str, *, names: Sequence[str] | None, count: int
) -> list[int]:
    """The classes of a column by index. It holds names if it is not all whole numbers, or if all its numbers are names."""
    places: dict[str, list[int]] = {}
    for number, name in enumerate(names or ()):
        places.setdefault(name, []).append(number)
    values = [str(getattr(row, column)) for row in rows]
    by_index = all(value.isdecimal() for value in values) and not all(value in places for value in values)
    found = []
    for row, value in zip(rows, values, strict=True):
        where = f"--class_map={path}, line {row.line}: {value:.100}: "
        here = ([int(value)] if int(value) < count else []) if by_index else places.get(value, [])
        if not here and names is None and not by_index:
            raise UserError(
                f"{where}is no index, and the names of the teacher's classes are not known; pass --class_names"
            )
        if not here:
            by_name = "" if names is None else f", or a name such as {names[0]!r:.100}"
            raise UserError(f"{where}is no {_WHAT[column]}; expected an index of 0 to {count - 1:,}{by_name}")
        if len(here) > 1:
            raise UserError(
                f"{where}is the name of the classes {', '.join(map(str, here[:5]))}; use indices in this column"
            )
        found += here
    return found
