"""Several steps as one XLA program: a loop on the device over a stack of batches.

XLA has no kernel for drawing from an iterator (IteratorGetNext), which Keras's loop over `steps_per_execution` does
inside: compiled by Keras, each step is a program of its own. Here the iterator stays outside of the program. The
batches of an execution are drawn into a stack of fixed size, and a shorter execution leaves the end of its stack
empty: one program, compiled once, serves them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import tensorflow as tf

Batch = dict[str, tf.Tensor]
Figures = dict[str, tf.Tensor]


def stack_batches(batches: Iterator[Batch], count: tf.Tensor, *, size: int) -> Batch:
    """Draws batches into a stack; inside a `tf.function`, outside of XLA.

    Args:
      batches: an iterator over a `tf.data.Dataset` of dicts of tensors of static shape.
      count: int64 scalar, how many to draw, 1 to `size`.
      size: n of the stack.

    Returns:
      The dict, each tensor with a leading axis [n]; zeros from `count` on.
    """
    drawn = {
        name: tf.TensorArray(spec.dtype, size=size, element_shape=spec.shape)
        for name, spec in batches.element_spec.items()  # type: ignore[attr-defined]
    }

    def draw(i: tf.Tensor, drawn: dict[str, tf.TensorArray]) -> tuple[tf.Tensor, dict[str, tf.TensorArray]]:
        batch = next(batches)
        return i + 1, {name: array.write(i, batch[name]) for name, array in drawn.items()}

    _, drawn = tf.while_loop(lambda i, _: tf.cast(i, tf.int64) < count, draw, (0, drawn))
    return {name: array.stack() for name, array in drawn.items()}


def run_steps(
    step: Callable[[Batch], Figures], batches: Batch, count: tf.Tensor, *, none: Figures
) -> Figures:
    """Takes the first steps of a stack of batches, one after the other; compiles under XLA.

    Args:
      step: one update; its figures of a batch.
      batches: a batch with a leading axis [n].
      count: int64 scalar, how many steps, 1 to n.
      none: figures in the shape that `step` returns them in.

    Returns:
      The figures of the last step.
    """

    def body(i: tf.Tensor, _: Figures) -> tuple[tf.Tensor, Figures]:
        # Not `stack[i]`: XLA pads the whole stack to twice its size in every dimension for that.
        return i + 1, step({name: tf.gather(stack, i) for name, stack in batches.items()})

    _, figures = tf.while_loop(lambda i, _: tf.cast(i, tf.int64) < count, body, (0, none))
    return figures
