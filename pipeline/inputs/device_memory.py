"""Turns TensorFlow's out-of-memory errors, on an accelerator or in its host allocator, into one line with a remedy."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import tensorflow as tf

from pipeline.errors import UserError
from pipeline.errors.causes import chain, system_error

# CUDA's libraries and XLA report some of them as internal errors.
_MESSAGE = re.compile(r"OUT_OF_MEMORY|out of memory|ran out of memory|ALLOC_FAILED", re.IGNORECASE)
_TENSOR = re.compile(
    r"OOM when allocating tensor with shape ?(\[[\d,]*\]) and type (\w+) on \S*?device:(\w+:\d+)"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether TensorFlow could not allocate memory. A full disk raises the same type and is not meant."""
    if system_error(error) is not None:
        return False
    return any(
        isinstance(link, tf.errors.ResourceExhaustedError)
        or (isinstance(link, tf.errors.OpError) and _MESSAGE.search(str(link)) is not None)
        for link in chain(error)
    )


def out_of_memory(error: BaseException, remedy: str) -> UserError | None:
    """The UserError for an out-of-memory error of TensorFlow; None for other errors.

    Args:
      error: the error that TensorFlow raised.
      remedy: what the user can do.
    """
    if not is_out_of_memory(error):
        return None
    found = next(filter(None, (_TENSOR.search(str(link)) for link in chain(error))), None)
    where = f" on {found[3]}, for a tensor of {found[2]} {found[1]}" if found else ""
    return UserError(f"out of memory{where}; {remedy}")


@contextlib.contextmanager
def naming_memory(remedy: str) -> Iterator[None]:
    """Converts out-of-memory errors within the context; see `out_of_memory`.

    Raises:
      UserError: memory ran out.
    """
    try:
        yield
    except tf.errors.OpError as error:
        if (found := out_of_memory(error, remedy)) is None:
            raise
        raise found from error
