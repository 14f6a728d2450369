"""Several steps as one XLA program: a loop on the device over a stack of batches.

XLA has no kernel for IteratorGetNext, which Keras calls inside its loop over `steps_per_execution`, so Keras compiles each
step as a separate program. Here the iterator stays outside the program: batches are first collected in a stack of fixed
size. If there are fewer, the end of the stack stays empty, so one program, compiled once, serves any number of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import tensorflow as tf

Batch = dict[str, tf.Tensor]
Figures = dict[str, tf.Tensor]


def stack_batches(batches: Iterator[Batch], count: tf.Tensor, *, size: int) -> Batch:
    """Collects batches in a stack; for use inside a `tf.function`, outside XLA.

    Args:
      batches: Iterator over a `tf.data.Dataset` of dicts, or nested dicts, of tensors of static shape.
      count: int64 scalar, number of batches to take, 1 to `size`.

    Returns:
      The dict, each tensor with a leading axis [n]; zeros from `count` on.
    """
    specs = batches.element_spec  # type: ignore[attr-defined]
    drawn = [
        tf.TensorArray(spec.dtype, size=size, element_shape=spec.shape) for spec in tf.nest.flatten(specs)
    ]

    def draw(i: tf.Tensor, drawn: list[tf.TensorArray]) -> tuple[tf.Tensor, list[tf.TensorArray]]:
        tensors = tf.nest.flatten(next(batches))
        return i + 1, [array.write(i, tensor) for array, tensor in zip(drawn, tensors, strict=True)]

    _, drawn = tf.while_loop(lambda i, _: tf.cast(i, tf.int64) < count, draw, (0, drawn))
    stacks: Batch = tf.nest.pack_sequence_as(specs, [array.stack() for array in drawn])
    return stacks


def run_steps(
    step: Callable[[Batch], Figures], batches: Batch, count: tf.Tensor, *, initial: Figures
) -> Figures:
    """Runs a step on the first batches of a stack, in order; compiles under XLA.

    Args:
      step: Performs one update on a batch and returns its figures.
      batches: Dict of tensors with a leading axis [n].
      count: int64 scalar, number of steps, 1 to n.
      initial: Figures with the shapes and types of those that `step` returns; their values are not used.

    Returns:
      The figures of the last step.
    """

    def body(i: tf.Tensor, _: Figures) -> tuple[tf.Tensor, Figures]:
        # Not `stack[i]`, for which XLA pads the whole stack to twice its size in every dimension.
        return i + 1, step(tf.nest.map_structure(lambda stack: tf.gather(stack, i), batches))

    _, figures = tf.while_loop(lambda i, _: tf.cast(i, tf.int64) < count, body, (0, initial))
    return figures
