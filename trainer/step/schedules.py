"""Learning rate schedules.

A schedule returns a *multiplier* in 0..1, because it scales two things: the base learning rate and, in big_vision, the
weight decay, which must not depend on the base rate. Each formula is written once and evaluated by TensorFlow in the
train step and by NumPy for logs and plots.

Steps are int64. Differences are computed in integers, before the cast to float32, so that a run of more than 2**24 steps
loses no step to rounding.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import Any

import numpy as np
import tensorflow as tf

from pipeline.errors import UserError


def to_float32(xp: Any, value: Any) -> Any:
    """A value as float32 of the library `xp`, `numpy` or `tensorflow`."""
    return tf.cast(value, tf.float32) if xp is tf else np.asarray(value, np.float32)


def ramp(step: Any, warmup_steps: int, xp: Any) -> Any:
    """Linear ramp from 0 at step 0 to 1 at `warmup_steps`; `step` is int64."""
    if warmup_steps == 0:
        return to_float32(xp, xp.ones_like(step))
    return to_float32(xp, xp.minimum(step, warmup_steps)) / np.float32(warmup_steps)


class Multiplier(tf.keras.optimizers.schedules.LearningRateSchedule, abc.ABC):
    """Maps a step to a multiplier in 0..1. The optimizer calls it with its int64 `iterations`."""

    @abc.abstractmethod
    def formula(self, step: Any, xp: Any) -> Any:
        """The multiplier, written once for both libraries.

        Args:
          step: int64 scalar or array of the library `xp`, >= 0.
          xp: `numpy` or `tensorflow`.

        Returns:
          float32 of the shape of `step`.
        """

    def __call__(self, step: Any) -> tf.Tensor:
        """The multiplier as a float32 tensor of the shape of `step` (any integer)."""
        return self.formula(tf.cast(step, tf.int64), tf)

    def numpy(self, step: Any) -> np.ndarray:
        """The same multiplier in NumPy: float32 of the shape of `step` (integers)."""
        return np.asarray(self.formula(np.asarray(step, np.int64), np))

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return dict(vars(self))


@dataclasses.dataclass(frozen=True)
class WarmupCosine(Multiplier):
    """Linear warm-up from 0, then a half cosine to 0 at `total_steps` (big_vision's `decay_type="cosine"`).

    `min(1, step / warmup_steps) * (1 + cos(pi * progress)) / 2`, with `progress` 0 at the end of the warm-up and 1 at
    `total_steps`. It is evaluated as `sin^2` of the remaining steps, which is equal and does not cancel near the end.
    A warm-up that is at least as long as the run leaves only the ramp, and 0 from `total_steps` on.

    Attributes:
      total_steps: Steps of the run, >= 1.
      warmup_steps: Steps of the warm-up, >= 0; both sources of the recipes use 1500.

    Raises:
      UserError: an argument is out of range.
    """

    total_steps: int
    warmup_steps: int

    def __post_init__(self) -> None:
        _check_steps("total_steps", self.total_steps, at_least=1)
        _check_steps("warmup_steps", self.warmup_steps, at_least=0)

    def formula(self, step: Any, xp: Any) -> Any:
        span = max(self.total_steps - self.warmup_steps, 1)
        remaining = xp.minimum(xp.maximum(self.total_steps - step, 0), span)
        fraction = to_float32(xp, remaining) / np.float32(span)
        return ramp(step, self.warmup_steps, xp) * xp.sin(np.float32(math.pi / 2) * fraction) ** 2


@dataclasses.dataclass(frozen=True)
class WarmupConstant(Multiplier):
    """Linear warm-up from 0, then constantly 1, for runs without an end.

    Attributes:
      warmup_steps: Steps of the warm-up, >= 0; with 0, the multiplier is always 1.

    Raises:
      UserError: `warmup_steps` is negative or not an integer.
    """

    warmup_steps: int

    def __post_init__(self) -> None:
        _check_steps("warmup_steps", self.warmup_steps, at_least=0)

    def formula(self, step: Any, xp: Any) -> Any:
        return ramp(step, self.warmup_steps, xp)


@dataclasses.dataclass(frozen=True)
class Scaled(tf.keras.optimizers.schedules.LearningRateSchedule):
    """A learning rate or weight decay: a base value times a multiplier.

    Attributes:
      base: Value at multiplier 1, finite and >= 0.
      multiplier: Schedule in 0..1.

    Raises:
      UserError: `base` is negative or not finite.
    """

    base: float
    multiplier: Multiplier

    def __post_init__(self) -> None:
        if not (math.isfinite(self.base) and self.base >= 0):
            raise UserError(f"learning rate or weight decay {self.base}: expected a finite number >= 0")

    def __call__(self, step: Any) -> tf.Tensor:
        """float32 of the shape of `step` (any integer)."""
        return np.float32(self.base) * self.multiplier(step)

    def numpy(self, step: Any) -> np.ndarray:
        """The same value in NumPy: float32 of the shape of `step` (integers)."""
        return np.float32(self.base) * self.multiplier.numpy(step)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"base": self.base, "multiplier": self.multiplier}


def _check_steps(name: str, value: int, *, at_least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise UserError(f"`{name}`={value!r}: expected an integer >= {at_least}")
