"""AdamW as defined by the two sources of the recipes. The only importer of tensorflow_addons.

AdamW first decays, `w -= wd_t * w`, then takes Adam's step from the decayed weight. `wd_t` is a schedule of `iterations` and is
*not* multiplied by the learning rate, which is why Keras's class of that name does not serve. TFA's development has ended, and
later versions of TensorFlow cannot load it (docs/design.md, "Platforms"): there, `KerasAdamW` takes its place. Steps and
checkpoints of the two are equal, so that a run may continue in another environment.
"""

from __future__ import annotations

import importlib.util
import re
import warnings
from typing import Any

import tensorflow as tf

from trainer.config.recipes import TrainRecipe
from trainer.step.schedules import Multiplier, Scaled, WarmupConstant

# `.../kernel:0`, `.../depthwise_kernel:0`; on the other replicas of a strategy `.../kernel/replica_1:0`.
_KERNEL = re.compile(r"kernel(/replica_\d+)?:\d+$")


class KerasAdamW(tf.keras.optimizers.legacy.Adam):
    """AdamW of Keras's Adam alone, equal to TFA's bit for bit, and with the same variables in a checkpoint.

    Args:
      weight_decay: Fraction of a weight that a step subtracts, as a function of `iterations`.
      **arguments: Arguments of Adam.
    """

    def __init__(self, weight_decay: Scaled, **arguments: Any) -> None:
        super().__init__(name="AdamW", **arguments)
        self._weight_decay = weight_decay

    def _prepare_local(self, device: str, dtype: tf.DType, apply_state: dict[Any, Any]) -> None:
        super()._prepare_local(device, dtype, apply_state)
        apply_state[device, dtype]["decay"] = tf.cast(self._weight_decay(self.iterations), dtype)

    def _do_use_weight_decay(self, var: tf.Variable) -> bool:
        """Whether a variable decays."""
        del var
        return True

    def _resource_apply_dense(
        self, grad: tf.Tensor, var: tf.Variable, apply_state: dict[Any, Any] | None = None
    ) -> tf.Operation:
        decayed = []
        if self._do_use_weight_decay(var):
            decayed.append(var.assign_sub(self._decay(var, apply_state) * var))
        with tf.control_dependencies(decayed):
            return super()._resource_apply_dense(grad, var, apply_state)

    def _resource_apply_sparse(
        self,
        grad: tf.Tensor,
        var: tf.Variable,
        indices: tf.Tensor,
        apply_state: dict[Any, Any] | None = None,
    ) -> tf.Operation:
        decayed = []
        if self._do_use_weight_decay(var):  # only the rows that have a gradient
            rows = self._decay(var, apply_state) * tf.gather(var, indices)
            decayed.append(self._resource_scatter_add(var, indices, -rows))
        with tf.control_dependencies(decayed):
            return super()._resource_apply_sparse(grad, var, indices, apply_state)

    def _decay(self, var: tf.Variable, apply_state: dict[Any, Any] | None) -> tf.Tensor:
        """The fraction of `var` that this step subtracts."""
        key = (var.device, var.dtype.base_dtype)
        return ((apply_state or {}).get(key) or self._fallback_apply_state(*key))["decay"]


def _adamw_class() -> type[tf.keras.optimizers.legacy.Optimizer]:
    """TFA's AdamW where it is installed, else Keras's."""
    if importlib.util.find_spec("tensorflow_addons") is None:
        return KerasAdamW
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=r"\s*TensorFlow Addons \(TFA\) has ended", category=UserWarning
        )
        import tensorflow_addons as tfa
    return tfa.optimizers.AdamW  # type: ignore[no-any-return]


def kernels_only(
    adamw: type[tf.keras.optimizers.legacy.Optimizer],
) -> type[tf.keras.optimizers.legacy.Optimizer]:
    """An AdamW that decays only kernels, recognized by the variable's name.

    TFA's own `exclude_from_weight_decay` compares variables by identity. Under a MirroredStrategy it gets their
    components, which it does not know, and decays none of them. A name is the same on every replica and needs no
    state in a checkpoint.
    """

    class KernelAdamW(adamw):  # type: ignore[misc, valid-type]
        def _do_use_weight_decay(self, var: tf.Variable) -> bool:
            return _KERNEL.search(var.name) is not None

    return KernelAdamW


ADAMW = _adamw_class()


def recipe_optimizer(
    recipe: TrainRecipe,
    schedule: Multiplier,
    *,
    adamw: type[tf.keras.optimizers.legacy.Optimizer] = ADAMW,
) -> tf.keras.optimizers.legacy.Optimizer:
    """Creates an AdamW. `optimizer.iterations` (int64) is the step, which determines rate and decay.

    Neither the rate nor the decay is a variable: they come from the arguments, not from a checkpoint.

    Args:
      recipe: Base rate, decay, clipping (under a strategy, of the sum over replicas) and epsilon.
      schedule: Multiplier in 0..1; the rate of step `t` is `recipe.learning_rate * schedule(t)`.
      adamw: By default, that of this environment.
    """
    clipping: dict[str, Any] = {
        "none": {},
        "per_variable": {"clipnorm": recipe.clip_norm},
        "global": {"global_clipnorm": recipe.clip_norm},
    }[recipe.clip]
    constant = WarmupConstant(0)
    return (kernels_only(adamw) if recipe.decay_kernels_only else adamw)(
        weight_decay=Scaled(recipe.weight_decay, schedule if recipe.decay_mode == "scaled" else constant),
        learning_rate=Scaled(recipe.learning_rate, schedule),
        epsilon=recipe.epsilon,
        **clipping,
    )
