"""Finds the reason behind an exception that crossed a process or a library.

Beam workers and tf.data threads turn exceptions into text inside exceptions of their own. `find_error` recovers a `UserError`
or `DataError` from them, and `of_the_system` what the operating system reported.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Iterator

from pipeline.errors import DataError, UserError

_BEAMS = " [while running"  # begins what Beam adds to the message of an error of one of its steps
# As in "pipeline.errors.DataError: view 7: ...", up to the end of its line or Beam's own addition.
_IN_TEXT = r"\b({kinds}): (.+?)(?= \[while running|\\n|\n|$)"


def _kinds() -> dict[str, type[UserError | DataError]]:
    """All types of our errors by name, subclasses in other modules included."""
    found: list[type[UserError | DataError]] = [UserError, DataError]
    for kind in found:
        found += kind.__subclasses__()
    return {kind.__name__: kind for kind in found}


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception, what it was raised from or while handling, and so on."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def raised_in(error: BaseException) -> str:
    """The package whose line raised an exception, or called what did of Python's own; empty if nothing raised it."""
    trace, package = error.__traceback__, ""
    while trace is not None:
        name = str(trace.tb_frame.f_globals.get("__name__", "")).split(".")[0]
        package = package if name in sys.stdlib_module_names else name
        trace = trace.tb_next
    return package


# They raise an error of their own while they handle one of ours.
_WRAPPERS = frozenset({"", "apache_beam", "keras", "tensorflow"})
_OURS = re.compile(r'File "[^"]*\b(?:pipeline|trainer)/[^"/]+(?:/[^"/]+)*\.py"')
_HANDLING = "During handling of the above exception, another exception occurred:"
_CAUSING = "The above exception was the direct cause of the following exception:"


def _reasons(error: BaseException | None) -> Iterator[BaseException]:
    """An exception, and what it stands for: its causes, and what a library's wrapper was raised for.

    Not what one of our own lines failed at while it handled another exception: that is a defect, whatever was handled.
    """
    for link in chain(error):
        yield link
        context = None if link.__suppress_context__ else link.__context__
        if link.__cause__ is None and context is not None and not _wraps(link, context):
            return


def _wraps(error: BaseException, context: BaseException) -> bool:
    """Whether an error stands for the one that was being handled."""
    return raised_in(error) in _WRAPPERS or _origin(error) == _origin(context)


def _origin(error: BaseException) -> tuple[object, int]:
    """The line that raised an exception; a wrapper may have taken over the traceback of the original."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return (None, 0) if trace is None else (trace.tb_frame, trace.tb_lasti)


def _reasons_in_text(text: str) -> Iterator[str]:
    """As `_reasons`, of a traceback that is text: all that is left of an exception between processes."""
    parts = re.split(f"({_HANDLING}|{_CAUSING})", text)
    while parts:
        last = parts.pop()
        yield last
        if parts and parts.pop() == _HANDLING:
            frames, before = re.findall(r'File ".*', last), re.findall(r'File ".*', parts[-1])
            if frames and _OURS.match(frames[-1]) and frames[-1:] != before[-1:]:
                return


def first_line(error: BaseException) -> str:
    """What an exception of a library says first, at most 300 characters; its type if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def find_error(error: BaseException) -> UserError | DataError | None:
    """The UserError or DataError at the bottom of `error`, or None: the very object, if it is still there.

    Only an object keeps its attributes, such as an `exit_code` of its own; text keeps the type and the message.

    Args:
      error: an exception as it came out of Beam or TensorFlow. Both may have turned the original into
        text, with their own lines around it.
    """
    ours = [link for link in _reasons(error) if isinstance(link, UserError | DataError)]
    if ours:
        # Beam raises a new error of the same type, without the attributes, while it handles the original.
        first, message = ours[0], str(ours[0]).split(_BEAMS)[0]
        same = [link for link in ours if type(link) is type(first) and str(link) == message]
        return same[-1] if same else type(first)(message)
    kinds = _kinds()
    pattern = _IN_TEXT.format(kinds="|".join(kinds))
    for link in _reasons(error):
        for text in _reasons_in_text(str(link)):
            if found := re.findall(pattern, text):
                kind, message = found[-1]
                return kinds[kind](message.strip())
    return None


_AGAIN = "run the same command again: nothing published is lost"
# What helps, by what the operating system says.
_REMEDIES = {
    errno.ENOSPC: f"make room and {_AGAIN}",
    errno.EDQUOT: f"make room below the quota and {_AGAIN}",
    errno.EFBIG: f"raise the limit on the size of files (`ulimit -f unlimited`) and {_AGAIN}",
    errno.EROFS: "name a directory that can be written",
    errno.EACCES: "get the right to it, or name another",
    errno.EPERM: "get the right to it, or name another",
    errno.EMFILE: f"raise the limit of open files (`ulimit -n 65536`) and {_AGAIN}",
    errno.ENFILE: f"the machine has too many files open: end other programs and {_AGAIN}",
    errno.ENAMETOOLONG: "name a shorter path",
    errno.ENOTDIR: "a file is in the way: name another directory",
    errno.EIO: "the disk may be failing: check it, or name a directory on another",
    errno.EBUSY: _AGAIN,
    errno.ENOMEM: f"end other programs and {_AGAIN}",
    errno.ESTALE: f"mount that file system again and {_AGAIN}",
}
_OF_A_PATH = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOTDIR}
_REASONS = "|".join(re.escape(os.strerror(code)) for code in _REMEDIES)
# How libraries tell the same inside a text of their own; also all that is left of an exception between processes.
_SYSTEM_TEXTS = (
    # Of TensorFlow, as in `{{function_node ...}} the/path; No space left on device [Op:SaveV2]`.
    re.compile(rf"(?P<path>[^;\n]+); (?P<reason>{_REASONS})\b"),
    # Of ArrayRecord, as in `write() failed: No space left on device; writing the/path; at byte 4096`.
    re.compile(rf"\w\(\) failed: (?P<reason>{_REASONS}); \w+ (?P<path>[^;\n]+)"),
    # Of Python, of one file or of the second of two: `[Errno 28] No space left on device: 'a' -> 'the/path'`.
    re.compile(rf"\[Errno \d+\] (?P<reason>{_REASONS})(?:: (?:'[^'\n]*' -> )?'(?P<path>[^'\n]+)')?"),
)
_CODES = {os.strerror(code): code for code in _REMEDIES}


def remedy(code: int | None, *, otherwise: str = _AGAIN) -> str:
    """What a user can do where the operating system says `code`, an errno; `otherwise` where it is not known."""
    return _REMEDIES.get(code or 0, otherwise)


def of_the_system(error: BaseException) -> UserError | None:
    """A full disk, a missing right, too many open files: what the user can fix, in one line; else None.

    Other OSErrors, such as of a file that is not there, are defects: what a user names is checked where it is read.

    Args:
      error: as Python raises it, or one of a library's with the system's reason in its text.
    """
    for link in _reasons(error):
        if isinstance(link, OSError) and link.strerror:
            path = link.filename2 or link.filename
            if link.errno in _REMEDIES and (path or link.errno not in _OF_A_PATH):
                return _refusal(path, link.strerror, link.errno)
        elif isinstance(link, OSError | RuntimeError) or type(link).__module__ != "builtins":
            for text in _reasons_in_text(str(link)):
                if (found := _in_text(text)) is not None:
                    return found
    return None


def _in_text(text: str) -> UserError | None:
    for pattern in _SYSTEM_TEXTS:
        if found := pattern.search(text):
            path = (found["path"] or "").split("}} ")[-1].split("Error: ")[-1]
            return _refusal(path, found["reason"], _CODES[found["reason"]])
    return None


def _refusal(path: object, reason: str, code: int | None) -> UserError:
    name = f"{path}: " if path else ""
    return UserError(f"{name}{reason}; {remedy(code)}")


def find_reason(error: BaseException) -> UserError | DataError | None:
    """What a command says of `error` in one line; None if it is a defect, which keeps its traceback."""
    return find_error(error) or of_the_system(error)
