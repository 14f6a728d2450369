"""Trial of a teacher: is each output a function of one row, and is it logits?

A store is only as good as this: a view's logits must not depend on the batch that the view happened to be in, nor on
chance. Exports in training mode (batch statistics, dropout) break that, and nothing later would show it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tensorflow as tf

from pipeline.errors import UserError

Run = Callable[[np.ndarray], np.ndarray]  # crops uint8 [B, S, S, 3] to outputs float32 [B, C]

# How far a row's outputs may move when it is run again, relative to the largest of them. Only rounding may move them:
# sums in another order, in the type that the teacher computes in. A network of L layers rounds L times; the errors are
# independent, so they grow like sqrt(L) * eps / 2 / sqrt(3): 2 eps for 50 layers, 3.5 eps for 150. Hence 4 eps of
# bfloat16 (2**-7) and of float16 (2**-10). GPUs multiply float32 as TF32, whose eps is 2**-10, with exact sums: 1e-3.
# Measured on CPU: 0.0 for EfficientNet-Lite0, ResNet50V2 and BiT-R50x1, in float32 and bfloat16; 0.9 for batch
# norm in training mode.
TOLERANCES = {"bfloat16": 4 * 2.0**-7, "float16": 4 * 2.0**-10}
TOLERANCE = 1e-3

_HALF_TYPES = {int(tf.as_dtype(name).as_datatype_enum): name for name in TOLERANCES}
# Of the sum of a row of probabilities. The sum of C numbers, each rounded to bfloat16, is off by 2**-8 at most; a
# softmax that adds and divides in bfloat16 by up to four times as much.
_SUM_TOLERANCE = 0.02


def tolerance_of(graph: tf.Graph) -> float:
    """The tolerance for a traced teacher: that of the coarsest type which it, or a function it calls, computes in."""
    definition = graph.as_graph_def()
    nodes = [*definition.node, *(node for f in definition.library.function for node in f.node_def)]
    types = {value.type for node in nodes for value in node.attr.values()}
    return max([TOLERANCE, *(TOLERANCES[name] for number, name in _HALF_TYPES.items() if number in types)])


def check_rows(run: Run, crops: np.ndarray, *, tolerance: float, path: str) -> None:
    """Runs crops twice, and half of them again in another order and among rows of noise.

    Args:
      run: the teacher, without checks of its own: what it makes of noise does not matter.
      crops: uint8 [B, S, S, 3]; with B = 1 a row has no neighbors, and only chance is looked for.
      tolerance: relative to the largest output of a row.
      path: of the teacher, for the message.

    Raises:
      UserError: an output depends on chance, or on the rest of the batch.
    """
    first = run(crops)
    again = _largest_change(first, run(crops))
    if not again <= tolerance:
        raise UserError(
            f"--teacher={path}: the same batch, run twice, gives outputs that differ by {again:.2g} of the largest, where "
            f"rounding allows {tolerance:.2g}: they depend on chance (dropout?); export it in inference mode "
            "(training=False)"
        )
    kept = len(crops) // 2
    if not kept:
        return
    noise = np.random.default_rng(0).integers(0, 256, crops.shape, np.uint8)
    noise[-kept:] = crops[:kept][::-1]
    moved = _largest_change(first[:kept], run(noise)[-kept:][::-1])
    if not moved <= tolerance:
        raise UserError(
            f"--teacher={path}: the same images, among others in the batch and in another order, give outputs that differ "
            f"by {moved:.2g} of the largest, where rounding allows {tolerance:.2g}: they depend on the rest of the batch "
            "(batch norm in training mode?); export it in inference mode (training=False)"
        )


def _largest_change(before: np.ndarray, after: np.ndarray) -> float:
    """Largest difference between two [n, C], relative to the row's largest output; NaN where one is not finite."""
    if before.shape != after.shape:
        return float("nan")
    scale = np.maximum(np.abs(before).max(axis=1), np.finfo(np.float32).tiny)
    return float((np.abs(before - after).max(axis=1) / scale).max())


def check_differs(outputs: np.ndarray, crops: np.ndarray, *, path: str) -> None:
    """Refuses a teacher that does not look: outputs [n, C] that are all the same, of crops that are not.

    Raises:
      UserError: they are the same.
    """
    if len(outputs) > 1 and (outputs == outputs[0]).all() and (crops != crops[0]).any():
        raise UserError(
            f"--teacher={path}: its output is the same for {len(outputs)} different views, from {outputs[0].min():.3g} to "
            f"{outputs[0].max():.3g}; check that it is trained, and its --teacher_value_range"
        )


def check_logits(outputs: np.ndarray, *, path: str, assume_logits: bool) -> None:
    """Refuses probabilities, float32 [n, C]: the KL between their softmaxes would be silently wrong.

    Args:
      outputs: of n views.
      path: of the teacher, for the message.
      assume_logits: the user says that they are logits, whatever they look like; rows that sum to 1 are none.

    Raises:
      UserError: they are probabilities, or look like them.
    """
    lowest, highest, sums = outputs.min(), outputs.max(), outputs.sum(axis=1, dtype=np.float64)
    if lowest < 0:
        return
    remedy = "export the model without its last activation"
    if highest <= 1 + _SUM_TOLERANCE and np.abs(sums - 1).max() <= _SUM_TOLERANCE:
        raise UserError(
            f"--teacher={path}: its output is probabilities, expected logits: none is negative, and each row sums to "
            f"1; {remedy}"
        )
    if assume_logits:
        return
    if highest <= 1:
        looks = (
            f"all outputs of {len(outputs)} views lie in {lowest:.2g}..{highest:.2g}, like those of a sigmoid"
        )
    elif _sums_are_one_constant(outputs, sums):
        looks = f"none is negative, and each row sums to {sums.mean():.4g}, like a scaled softmax"
    else:
        return
    raise UserError(
        f"--teacher={path}: its output looks like probabilities: {looks}; expected logits: {remedy}, or pass "
        "--assume_logits if these are logits"
    )


def _sums_are_one_constant(outputs: np.ndarray, sums: np.ndarray) -> bool:
    """Whether rows differ, and their sums vary much less than those of independent outputs: [n, C] and [n]."""
    # Of C independent outputs with standard deviation s, the sum has sqrt(C) * s.
    spread = outputs.std(axis=0, dtype=np.float64).sum() / np.sqrt(outputs.shape[1])
    even = np.abs(sums - sums.mean()).max() <= _SUM_TOLERANCE * sums.mean()
    return bool(spread > 0 and even and sums.std() <= 0.3 * spread)


def trial_crops(count: int, image_size: int) -> np.ndarray:
    """Seeded pictures of soft colors, uint8 [count, S, S, 3], where no data set is at hand."""
    coarse = np.random.default_rng(1).integers(0, 256, (count, 4, 4, 3)).astype(np.float32)
    return np.array(tf.cast(tf.image.resize(coarse, [image_size, image_size]), tf.uint8))
