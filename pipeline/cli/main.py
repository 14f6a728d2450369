"""Runs a command, and reports errors on one line with an exit code.

`run_module` is the first statement of each command's module, before imports that take seconds.
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

from pipeline.cli.allocator import keep_freed_memory
from pipeline.cli.environment import grow_device_memory, use_keras_2
from pipeline.cli.logs import ReaderlessStandardError, show_warnings
from pipeline.cli.parameters import with_flags
from pipeline.errors import EXIT_INTERRUPTED, DataError, Interrupted, UserError
from pipeline.errors.causes import chain, find_reason

DEBUG_VARIABLE = "VIEW_DISTILL_DEBUG"  # 1 has the effect of `--debug`, also in child processes


def _interrupted() -> int:
    print("interrupted; published data is safe, rerun the same command to continue", file=sys.stderr)
    return EXIT_INTERRUPTED


def _has_no_reader(stream: TextIO) -> bool:
    """Whether a stream is a pipe whose other end is closed."""
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _report(error: UserError | DataError, *, behind: BaseException) -> int:
    """Prints an error; returns its exit code."""
    if os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0"):
        traceback.print_exception(behind)
    print(f"error: {with_flags(str(error))}", file=sys.stderr)
    return error.exit_code


def _exit_code(error: Exception) -> int | None:
    """Reports an exception and returns the exit code; None for a defect."""
    found = find_reason(error)
    if found is not None:
        return _report(found, behind=error)
    if any("KeyboardInterrupt" in f"{link!r}" for link in chain(error)):
        return _interrupted()  # Beam wraps it, as text
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
    """Ends the process without finalizing the interpreter.

    A failed run leaves iterators of tf.data behind, whose threads call Python. The finalization waits for these threads and keeps
    them from running, so the process would never end.
    """
    atexit._run_exitfuncs()  # removes temporary directories
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_module(name: str, *, flags: str | None = None) -> NoReturn:
    """Imports a command's module and runs its `main`.

    Called in the first lines of the module, under `if __name__ == "__main__"`, before its other imports. TensorFlow and Beam take
    seconds to import, and Ctrl-C during the import must be handled as well. Besides, other processes can import the module by its name,
    but not as `__main__`.

    Args:
      name: name of the module, such as `trainer.train`.
      flags: module whose `parse` checks the command's arguments. It is called first and imports nothing that takes seconds, so that
        `--help` and mistakes are answered at once.
    """

    def main(argv: list[str]) -> int | None:
        if flags is not None:
            importlib.import_module(flags).parse(argv)
        code: int | None = importlib.import_module(name).main(argv)
        return code

    sys.stderr = ReaderlessStandardError(sys.stderr)  # type: ignore[assignment]
    show_warnings()
    use_keras_2()
    keep_freed_memory()
    grow_device_memory()
    try:
        run_command(main)
    except SystemExit as end:
        if end.code:
            _exit_at_once(int(end.code))
        raise
