"""AdamW as defined by the two sources of the recipes. The only importer of tensorflow_addons.

TFA's development has ended (docs/design.md, "Platforms"); replacing it means rewriting only this file. Its AdamW first decays,
`w -= wd_t * w`, then takes Adam's step from the decayed weight. `wd_t` is a number or a schedule of `iterations` and is
*not* multiplied by the learning rate.
"""

from __future__ import annotations

import re
import warnings
from typing import Any

import tensorflow as tf

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


def recipe_optimizer(recipe: TrainRecipe, schedule: Multiplier) -> tf.keras.optimizers.legacy.Optimizer:
    """Creates TFA's AdamW. `optimizer.iterations` (int64) is the step, which determines rate and decay.

    Neither the rate nor the decay is a variable: they come from the arguments, not from a checkpoint.

    Args:
      recipe: Base rate, decay, clipping (under a strategy, of the sum over replicas) and epsilon.
      schedule: Multiplier in 0..1; the rate of step `t` is `recipe.learning_rate * schedule(t)`.
    """
    clipping: dict[str, Any] = {
        "none": {},
        "per_variable": {"clipnorm": recipe.clip_norm},
        "global": {"global_clipnorm": recipe.clip_norm},
    }[recipe.clip]
    constant = WarmupConstant(0)
    return (_KernelAdamW if recipe.decay_kernels_only else tfa.optimizers.AdamW)(
        weight_decay=Scaled(recipe.weight_decay, schedule if recipe.decay_mode == "scaled" else constant),
        learning_rate=Scaled(recipe.learning_rate, schedule),
        epsilon=recipe.epsilon,
        **clipping,
    )
