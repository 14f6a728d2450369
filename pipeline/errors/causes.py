"""Finds the cause of an exception that crossed a process or a library.

Beam workers and tf.data threads convert exceptions to text inside exceptions of their own. `find_error` recovers a `UserError` or
`DataError` from them, and `system_error` an error of the operating system. TensorFlow and ArrayRecord report those, too, only as
text: their exception types distinguish fewer cases, and only the text contains the path.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Iterator

from pipeline.errors import DataError, UserError

_BEAM_SUFFIX = " [while running"  # Beam appends the name of the step to the message of an error
# Matches "pipeline.errors.DataError: view 7: ...", up to the end of the line or Beam's suffix.
_IN_TEXT = r"\b({kinds}): (.+?)(?= \[while running|\\n|\n|$)"


def _kinds() -> dict[str, type[UserError | DataError]]:
    """All subclasses of UserError and DataError by name, including those in other modules."""
    found: list[type[UserError | DataError]] = [UserError, DataError]
    for kind in found:
        found += kind.__subclasses__()
    return {kind.__name__: kind for kind in found}


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception, the one that it was raised from or during the handling of, and so on."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def raised_in(error: BaseException) -> str:
    """The package that raised an exception, directly or in a call of the standard library; empty if it was not raised."""
    trace, package = error.__traceback__, ""
    while trace is not None:
        name = str(trace.tb_frame.f_globals.get("__name__", "")).split(".")[0]
        package = package if name in sys.stdlib_module_names else name
        trace = trace.tb_next
    return package


# Libraries that raise their own error while they handle one of this project.
_WRAPPERS = frozenset({"", "apache_beam", "keras", "tensorflow"})
_OURS = re.compile(r'File "[^"]*\b(?:pipeline|trainer)/[^"/]+(?:/[^"/]+)*\.py"')
_HANDLING = "During handling of the above exception, another exception occurred:"
_CAUSING = "The above exception was the direct cause of the following exception:"


def _reasons(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and its causes, including the exception that a library's wrapper was raised for.

    If code of this project fails while it handles an exception, the failure is a defect and the handled exception not its cause.
    """
    for link in chain(error):
        yield link
        context = None if link.__suppress_context__ else link.__context__
        if link.__cause__ is None and context is not None and not _wraps(link, context):
            return


def _wraps(error: BaseException, context: BaseException) -> bool:
    """Whether an error wraps the one that was being handled."""
    return raised_in(error) in _WRAPPERS or _origin(error) == _origin(context)


def _origin(error: BaseException) -> tuple[object, int]:
    """The position that raised an exception. A wrapper may have the traceback of the original."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return (None, 0) if trace is None else (trace.tb_frame, trace.tb_lasti)


def _reasons_in_text(text: str) -> Iterator[str]:
    """`_reasons` for a traceback as text, which is all that remains of an exception from another process."""
    parts = re.split(f"({_HANDLING}|{_CAUSING})", text)
    while parts:
        last = parts.pop()
        yield last
        if parts and parts.pop() == _HANDLING:
            frames, before = re.findall(r'File ".*', last), re.findall(r'File ".*', parts[-1])
            if frames and _OURS.match(frames[-1]) and frames[-1:] != before[-1:]:
                return


def first_line(error: BaseException) -> str:
    """First line of an exception's message, up to 300 characters; its type if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def find_error(error: BaseException) -> UserError | DataError | None:
    """The UserError or DataError that caused an exception, None if there is none.

    If the original object is available, it is returned with its attributes, such as `exit_code`. Text keeps only the type and the
    message.

    Args:
      error: exception raised by Beam or TensorFlow, which may contain the original as text with their own lines around it.
    """
    ours = [link for link in _reasons(error) if isinstance(link, UserError | DataError)]
    if ours:
        # While Beam handles the original, it raises a new error of the same type without the attributes.
        first, message = ours[0], str(ours[0]).split(_BEAM_SUFFIX)[0]
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


_AGAIN = "rerun the same command (published data is safe)"
# Remedies by errno.
_REMEDIES = {
    errno.ENOSPC: f"free up space and {_AGAIN}",
    errno.EDQUOT: f"free up space within the quota and {_AGAIN}",
    errno.EFBIG: f"raise the file size limit (`ulimit -f unlimited`) and {_AGAIN}",
    errno.EROFS: "use a writable directory",
    errno.EACCES: "change the permissions, or use another path",
    errno.EPERM: "change the permissions, or use another path",
    errno.EMFILE: f"raise the limit on open files (`ulimit -n 65536`) and {_AGAIN}",
    errno.ENFILE: f"too many files are open on this machine; end other programs and {_AGAIN}",
    errno.ENAMETOOLONG: "use a shorter path",
    errno.ENOTDIR: "a parent of the path is a file; use another directory",
    errno.EIO: "the disk may be failing; check it, or use a directory on another disk",
    errno.EBUSY: _AGAIN,
    errno.ENOMEM: f"end other programs and {_AGAIN}",
    errno.ESTALE: f"mount the file system again and {_AGAIN}",
}
_PATH_ERRORS = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOTDIR}
_REASONS = "|".join(re.escape(os.strerror(code)) for code in _REMEDIES)
# System errors inside texts of libraries, and in text from other processes.
_SYSTEM_TEXTS = (
    # TensorFlow, as in `{{function_node ...}} the/path; No space left on device [Op:SaveV2]`.
    re.compile(rf"(?P<path>[^;\n]+); (?P<reason>{_REASONS})\b"),
    # ArrayRecord, as in `write() failed: No space left on device; writing the/path; at byte 4096`.
    re.compile(rf"\w\(\) failed: (?P<reason>{_REASONS}); \w+ (?P<path>[^;\n]+)"),
    # Python, with one path or the second of two: `[Errno 28] No space left on device: 'a' -> 'the/path'`.
    re.compile(rf"\[Errno \d+\] (?P<reason>{_REASONS})(?:: (?:'[^'\n]*' -> )?'(?P<path>[^'\n]+)')?"),
)
_CODES = {os.strerror(code): code for code in _REMEDIES}


def remedy(code: int | None, *, otherwise: str = _AGAIN) -> str:
    """What a user can do about an errno; `otherwise` if it is not in the table."""
    return _REMEDIES.get(code or 0, otherwise)


def system_error(error: BaseException) -> UserError | None:
    """The one-line error for a full disk, a missing permission or another system error that a user can fix; None for others.

    Other OSErrors, such as a missing file, are defects, because user-supplied paths are checked where they are read.

    Args:
      error: exception of Python, or one of a library with the system's error message in its text.
    """
    for link in _reasons(error):
        if isinstance(link, OSError) and link.strerror:
            path = link.filename2 or link.filename
            if link.errno in _REMEDIES and (path or link.errno not in _PATH_ERRORS):
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
    """The error that a command reports on one line; None for a defect, which keeps its traceback."""
    return find_error(error) or system_error(error)
