"""AdamW as defined by the two sources of the recipes. The only importer of tensorflow_addons.

TFA's development has ended (docs/design.md, "Platforms"); replacing it means rewriting only this file. Its AdamW first decays,
`w -= wd_t * w`, then takes Adam's step from the decayed weight. `wd_t` is a number or a schedule of `iterations` and is
*not* multiplied by the learning rate.
"""

from __future__ import annotations

import math
import re
import warnings
from typing import Any, get_args

import tensorflow as tf

from pipeline.errors import UserError
from trainer.config.choices import Clip, DecayMode
from trainer.config.recipes import TrainRecipe
from trainer.step.schedules import Multiplier, Scaled, WarmupConstant

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message=r"\s*TensorFlow Addons \(TFA\) has ended", category=UserWarning)
    import tensorflow_addons as tfa


# `.../kernel:0`, `.../depthwise_kernel:0`; on the other replicas of a strategy `.../kernel/replica_1:0`.
_KERNEL = re.compile(r"kernel(/replica_\d+)?:\d+$")


class _KernelAdamW(tfa.optimizers.AdamW):
    """AdamW that decays only kernels, recognized by the variable's name.

    TFA's own `exclude_from_weight_decay` compares variables by identity. Under a MirroredStrategy it gets their
    components, which it does not know, and decays none of them. A name is the same on every replica and needs no
    state in a checkpoint.
    """

    def _do_use_weight_decay(self, var: tf.Variable) -> bool:
        return _KERNEL.search(var.name) is not None


def make_optimizer(
    learning_rate: float,
    *,
    schedule: Multiplier,
    weight_decay: float,
    decay_mode: DecayMode,
    decay_kernels_only: bool,
    clip: Clip,
    clip_norm: float,
    b1: float = 0.9,
    b2: float = 0.999,
    epsilon: float = 1e-7,
) -> tf.keras.optimizers.legacy.Optimizer:
    """Creates TFA's AdamW. `optimizer.iterations` (int64) is the step, which determines rate and decay.

    Neither the rate nor the decay is a variable: they come from the arguments, not from a checkpoint.

    Args:
      learning_rate: Base rate, >= 0; the rate of step `t` is `learning_rate * schedule(t)`.
      schedule: Multiplier in 0..1.
      weight_decay: Fraction of a weight that a step at multiplier 1 subtracts, >= 0.
      decay_mode: "scaled" for `w -= weight_decay * schedule(t) * w` (big_vision: scaled by the schedule, not by
        the base rate), "unscaled" for `w -= weight_decay * w` (Keras example).
      decay_kernels_only: Whether to decay only variables named `...kernel` (big_vision's `".*/kernel"`).
      clip: "per_variable" to clip each gradient to norm `clip_norm` (Keras example), "global" to clip all gradients
        together (big_vision), or "none". Under a strategy, clipping follows the sum over replicas.
      clip_norm: Largest norm, > 0; both sources use 1.0. Unused with "none".
      b1: Decay rate of the first moment.
      b2: Decay rate of the second moment.
      epsilon: Added to the root of the second moment, before the correction of its bias ("epsilon hat" of
        Kingma and Ba 2015). TFA's and Keras's default is 1e-7; Optax's, and so big_vision's, is 1e-8.

    Raises:
      UserError: an argument is out of range.
    """
    _check_choice("decay_mode", decay_mode, choices=get_args(DecayMode))
    _check_choice("clip", clip, choices=get_args(Clip))
    if clip != "none" and not (math.isfinite(clip_norm) and clip_norm > 0):
        raise UserError(f"`clip_norm`={clip_norm}: expected a finite number > 0 with `clip`={clip}")
    for name, beta in (("b1", b1), ("b2", b2)):
        if not 0 <= beta < 1:
            raise UserError(f"`{name}`={beta}: expected a number in [0, 1)")
    if not epsilon > 0:
        raise UserError(f"`epsilon`={epsilon}: expected a number > 0")
    clipping: dict[str, Any] = {
        "none": {},
        "per_variable": {"clipnorm": clip_norm},
        "global": {"global_clipnorm": clip_norm},
    }[clip]
    constant = WarmupConstant(0)
    return (_KernelAdamW if decay_kernels_only else tfa.optimizers.AdamW)(
        weight_decay=Scaled(weight_decay, schedule if decay_mode == "scaled" else constant),
        learning_rate=Scaled(learning_rate, schedule),
        beta_1=b1,
        beta_2=b2,
        epsilon=epsilon,
        **clipping,
    )


def _check_choice(name: str, value: str, *, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"`{name}`={value}: expected one of {', '.join(choices)}")


def recipe_optimizer(recipe: TrainRecipe, schedule: Multiplier) -> tf.keras.optimizers.legacy.Optimizer:
    """Creates the optimizer of a recipe; see `make_optimizer`.

    Args:
      recipe: Base rate, decay, clipping and epsilon.
      schedule: Multiplier of the base rate, 0..1.
    """
    return make_optimizer(
        recipe.learning_rate,
        schedule=schedule,
        weight_decay=recipe.weight_decay,
        decay_mode=recipe.decay_mode,
        decay_kernels_only=recipe.decay_kernels_only,
        clip=recipe.clip,
        clip_norm=recipe.clip_norm,
        epsilon=recipe.epsilon,
    )
