"""Checks that a teacher's outputs are logits, and that each depends on its own row only.

A view's logits must not depend on the other views of its batch or on chance. Exports in training mode (batch statistics,
dropout) violate that, and no later check would notice it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tensorflow as tf

from pipeline.errors import UserError

Run = Callable[[np.ndarray], np.ndarray]  # crops uint8 [B, S, S, 3] to outputs float32 [B, C]

# Largest accepted change of a row's outputs between two runs, relative to the largest output. Only rounding may change
# them: sums in another order, in the teacher's own type. A network of L layers rounds L times; the errors are independent
# and grow like sqrt(L) * eps / 2 / sqrt(3): 2 eps for 50 layers, 3.5 eps for 150. Hence 4 eps for bfloat16 (2**-7) and
# float16 (2**-10). GPUs multiply float32 as TF32, whose eps is 2**-10, with exact sums: 1e-3.
# Measured on CPU: 0.0 for EfficientNet-Lite0, ResNet50V2 and BiT-R50x1, in float32 and bfloat16; 0.9 for batch
# norm in training mode.
TOLERANCES = {"bfloat16": 4 * 2.0**-7, "float16": 4 * 2.0**-10}
TOLERANCE = 1e-3

_HALF_TYPES = {int(tf.as_dtype(name).as_datatype_enum): name for name in TOLERANCES}
# Tolerance of the sum of a row of probabilities. The sum of C numbers rounded to bfloat16 is off by at most 2**-8; a
# softmax that adds and divides in bfloat16 is off by up to four times as much.
_SUM_TOLERANCE = 0.02


def tolerance_of(graph: tf.Graph) -> float:
    """Tolerance for a traced teacher, from the coarsest type in its graph and the functions that it calls."""
    definition = graph.as_graph_def()
    nodes = [*definition.node, *(node for f in definition.library.function for node in f.node_def)]
    types = {value.type for node in nodes for value in node.attr.values()}
    return max([TOLERANCE, *(TOLERANCES[name] for number, name in _HALF_TYPES.items() if number in types)])


def check_rows(run: Run, crops: np.ndarray, *, tolerance: float, what: str) -> None:
    """Runs crops twice, and half of them again in another order and among rows of noise.

    Args:
      run: function that runs the teacher, without checks of finite outputs.
      crops: uint8 [B, S, S, 3]. With B = 1, only dependence on chance is checked.
      tolerance: largest accepted change, relative to the largest output of a row.
      what: the teacher, for errors, such as "`teacher`=DIR".

    Raises:
      UserError: an output depends on chance or on the rest of the batch.
    """
    first = run(crops)
    again = _largest_change(first, run(crops))
    if not again <= tolerance:
        raise UserError(
            f"{what}: two runs of the same batch differ by {again:.2g} of the largest output, expected at most "
            f"{tolerance:.2g}; the outputs depend on chance (dropout?): export it in inference mode (training=False)"
        )
    kept = len(crops) // 2
    if not kept:
        return
    noise = np.random.default_rng(0).integers(0, 256, crops.shape, np.uint8)
    noise[-kept:] = crops[:kept][::-1]
    moved = _largest_change(first[:kept], run(noise)[-kept:][::-1])
    if not moved <= tolerance:
        raise UserError(
            f"{what}: outputs of the same images in another batch differ by {moved:.2g} of the largest output, "
            f"expected at most {tolerance:.2g}; the outputs depend on the rest of the batch (batch norm in training mode?): "
            "export it in inference mode (training=False)"
        )


def _largest_change(before: np.ndarray, after: np.ndarray) -> float:
    """Largest difference between two arrays [n, C], relative to the row's largest output; NaN if one is not finite."""
    if before.shape != after.shape:
        return float("nan")
    scale = np.maximum(np.abs(before).max(axis=1), np.finfo(np.float32).tiny)
    return float((np.abs(before - after).max(axis=1) / scale).max())


def check_differs(outputs: np.ndarray, crops: np.ndarray, *, what: str) -> None:
    """Refuses a teacher with the same outputs [n, C] for different crops.

    Raises:
      UserError: all outputs are the same.
    """
    if len(outputs) > 1 and (outputs == outputs[0]).all() and (crops != crops[0]).any():
        raise UserError(
            f"{what}: its outputs are the same for {len(outputs)} different views, {outputs[0].min():.3g} to "
            f"{outputs[0].max():.3g}; check that the model is trained, and its `teacher_value_range`"
        )


def check_logits(outputs: np.ndarray, *, what: str, assume_logits: bool) -> None:
    """Refuses probabilities, float32 [n, C]: a softmax of probabilities would give a wrong loss without any error.

    Args:
      outputs: outputs of n views.
      what: the teacher, for errors, such as "`teacher`=DIR".
      assume_logits: whether to accept outputs that look like probabilities; rows that sum to 1 are refused anyway.

    Raises:
      UserError: the outputs are probabilities or look like them.
    """
    lowest, highest, sums = outputs.min(), outputs.max(), outputs.sum(axis=1, dtype=np.float64)
    if lowest < 0:
        return
    remedy = "export the model without its last activation"
    if highest <= 1 + _SUM_TOLERANCE and np.abs(sums - 1).max() <= _SUM_TOLERANCE:
        raise UserError(
            f"{what}: its outputs are probabilities (none is negative, each row sums to 1), expected logits; "
            f"{remedy}"
        )
    if assume_logits:
        return
    if highest <= 1:
        looks = f"all outputs of {len(outputs)} views are in {lowest:.2g}..{highest:.2g}, as from a sigmoid"
    elif _sums_are_one_constant(outputs, sums):
        looks = f"none is negative and each row sums to {sums.mean():.4g}, as from a scaled softmax"
    else:
        return
    raise UserError(
        f"{what}: its outputs look like probabilities ({looks}), expected logits; {remedy}, or pass "
        "`assume_logits` if they are logits"
    )


def _sums_are_one_constant(outputs: np.ndarray, sums: np.ndarray) -> bool:
    """Whether outputs [n, C] differ while their sums [n] vary much less than sums of independent outputs."""
    # The sum of C independent outputs with standard deviation s has the standard deviation sqrt(C) * s.
    spread = outputs.std(axis=0, dtype=np.float64).sum() / np.sqrt(outputs.shape[1])
    even = np.abs(sums - sums.mean()).max() <= _SUM_TOLERANCE * sums.mean()
    return bool(spread > 0 and even and sums.std() <= 0.3 * spread)


def trial_crops(count: int, image_size: int) -> np.ndarray:
    """Seeded smooth pictures, uint8 [count, S, S, 3], for checks without a data set."""
    coarse = np.random.default_rng(1).integers(0, 256, (count, 4, 4, 3)).astype(np.float32)
    return np.array(tf.cast(tf.image.resize(coarse, [image_size, image_size]), tf.uint8))
