"""Runs a command: maps exceptions to one line and an exit code.

`run_module` is the first statement of each command's module, before the imports that take seconds.
"""

from __future__ import annotations

import atexit
import importlib
import os
import select
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn, TextIO

from pipeline.cli.logs import ReaderlessStandardError, show_warnings
from pipeline.cli.parameters import with_flags
from pipeline.errors import EXIT_INTERRUPTED, DataError, Interrupted, UserError
from pipeline.errors.causes import chain, find_reason

DEBUG_VARIABLE = "VIEW_DISTILL_DEBUG"  # 1 in the environment: as `--debug`, here and in child processes


def _interrupted() -> int:
    print("interrupted; what was published stays, run the same command to continue", file=sys.stderr)
    return EXIT_INTERRUPTED


def _has_no_reader(stream: TextIO) -> bool:
    """Whether a stream is a pipe whose other end is closed."""
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _told(error: UserError | DataError, *, behind: BaseException) -> int:
    if os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0"):
        traceback.print_exception(behind)
    print(f"error: {with_flags(str(error))}", file=sys.stderr)
    return error.exit_code


def _exit_code(error: Exception) -> int | None:
    """Prints what a command says of `error`, and returns its exit code; None of a defect."""
    found = find_reason(error)
    if found is not None:
        return _told(found, behind=error)
    if any("KeyboardInterrupt" in f"{link!r}" for link in chain(error)):
        return _interrupted()  # Beam has made another exception of it
    return None


def run_command(main: Callable[[list[str]], int | None], argv: list[str] | None = None) -> NoReturn:
    """Runs a command's `main(argv)` and exits with the codes of docs/errors.md.

    Args:
      main: takes the arguments without the program's name; returns an exit code, None for 0.
      argv: the arguments; `sys.argv[1:]` by default.
    """
    arguments = sys.argv[1:] if argv is None else argv
    if "--debug" in arguments:
        os.environ[DEBUG_VARIABLE] = "1"  # for child processes as well
    try:
        code = main(arguments) or 0
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        code = stop.exit_code
    except KeyboardInterrupt:
        code = _interrupted()
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _has_no_reader(sys.stdout):  # `... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(1) from None
        if (found_code := _exit_code(error)) is None:
            raise
        code = found_code
    sys.stdout.flush()
    sys.stderr.flush()
    raise SystemExit(code)


def _exit_at_once(code: int) -> NoReturn:
    """Ends the process without taking the interpreter down.

    A failed run leaves iterators of tf.data behind, whose threads call Python. Taking the interpreter down waits for those
    threads and keeps them from running: an error was printed, and the process never ended.
    """
    atexit._run_exitfuncs()  # temporary directories
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_module(name: str, *, flags: str | None = None) -> NoReturn:
    """Runs the command that is a module's `main`, the module's import included.

    For the first lines of that module, before its other imports, under `if __name__ == "__main__"`: TensorFlow
    and Beam take seconds to import, and a Ctrl-C in them must end like any other. It also means that the
    module is known by its name rather than as `__main__`, by which no other process could import it.

    Args:
      name: of the module, such as `trainer.train`.
      flags: the module whose `parse` takes the command's arguments. It imports nothing that takes seconds, and is
        called first: `--help` and mistakes are answered at once.
    """

    def main(argv: list[str]) -> int | None:
        if flags is not None:
            importlib.import_module(flags).parse(argv)
        code: int | None = importlib.import_module(name).main(argv)
        return code

    sys.stderr = ReaderlessStandardError(sys.stderr)  # type: ignore[assignment]
    show_warnings()
    try:
        run_command(main)
    except SystemExit as end:
        if end.code:
            _exit_at_once(int(end.code))
        raise
