"""Names the flag that helps where TensorFlow has run out of memory, on an accelerator or in its host allocator."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import tensorflow as tf

from pipeline.errors import UserError
from pipeline.errors.causes import chain, of_the_system

# Besides ResourceExhaustedError: what CUDA's libraries and XLA report as internal errors.
_SAYS_SO = re.compile(r"OUT_OF_MEMORY|out of memory|ran out of memory|ALLOC_FAILED", re.IGNORECASE)
_TENSOR = re.compile(
    r"OOM when allocating tensor with shape ?(\[[\d,]*\]) and type (\w+) on \S*?device:(\w+:\d+)"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether TensorFlow could not allocate memory; a full disk, which has the same type, is something else."""
    if of_the_system(error) is not None:
        return False
    return any(
        isinstance(link, tf.errors.ResourceExhaustedError)
        or (isinstance(link, tf.errors.OpError) and _SAYS_SO.search(str(link)) is not None)
        for link in chain(error)
    )


def out_of_memory(error: BaseException, remedy: str) -> UserError | None:
    """The line for an error of TensorFlow's that means that memory has run out; None if it means something else.

    Args:
      error: as TensorFlow raised it.
      remedy: what to do, with the flag and its value.
    """
    if not is_out_of_memory(error):
        return None
    found = next(filter(None, (_TENSOR.search(str(link)) for link in chain(error))), None)
    where = f" on {found[3]}, for a tensor of {found[2]} {found[1]}" if found else ""
    return UserError(f"out of memory{where}; {remedy}")


@contextlib.contextmanager
def naming_memory(remedy: str) -> Iterator[None]:
    """Raises the line of `out_of_memory` instead of TensorFlow's error.

    Raises:
      UserError: memory has run out.
    """
    try:
        yield
    except tf.errors.OpError as error:
        if (found := out_of_memory(error, remedy)) is None:
            raise
        raise found from error
