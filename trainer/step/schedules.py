"""Learning rate schedules.

A schedule returns a *multiplier* in 0..1, because it scales two things: the base learning rate and, in big_vision, the
weight decay, which must not depend on the base rate.

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


def ramp(step: tf.Tensor, warmup_steps: int) -> tf.Tensor:
    """Linear ramp from 0 at step 0 to 1 at `warmup_steps`: int64 to float32."""
    if warmup_steps == 0:
        return tf.ones_like(step, tf.float32)
    return tf.cast(tf.minimum(step, warmup_steps), tf.float32) / np.float32(warmup_steps)


class Multiplier(tf.keras.optimizers.schedules.LearningRateSchedule, abc.ABC):
    """Maps a step to a multiplier in 0..1. The optimizer calls it with its int64 `iterations`."""

    @abc.abstractmethod
    def formula(self, step: tf.Tensor) -> tf.Tensor:
        """The multiplier, float32, of steps int64 >= 0 of the same shape."""

    def __call__(self, step: Any) -> tf.Tensor:
        """The multiplier as a float32 tensor of the shape of `step` (any integer)."""
        return self.formula(tf.cast(step, tf.int64))

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
    """

    total_steps: int
    warmup_steps: int

    def formula(self, step: tf.Tensor) -> tf.Tensor:
        span = max(self.total_steps - self.warmup_steps, 1)
        remaining = tf.minimum(tf.maximum(self.total_steps - step, 0), span)
        fraction = tf.cast(remaining, tf.float32) / np.float32(span)
        return ramp(step, self.warmup_steps) * tf.sin(np.float32(math.pi / 2) * fraction) ** 2


@dataclasses.dataclass(frozen=True)
class WarmupConstant(Multiplier):
    """Linear warm-up from 0, then constantly 1, for runs without an end.

    Attributes:
      warmup_steps: Steps of the warm-up, >= 0; with 0, the multiplier is always 1.
    """

    warmup_steps: int

    def formula(self, step: tf.Tensor) -> tf.Tensor:
        return ramp(step, self.warmup_steps)


@dataclasses.dataclass(frozen=True)
class Scaled(tf.keras.optimizers.schedules.LearningRateSchedule):
    """A learning rate or weight decay: a base value times a multiplier in 0..1."""

    base: float
    multiplier: Multiplier

    def __call__(self, step: Any) -> tf.Tensor:
        """float32 of the shape of `step` (any integer)."""
        return np.float32(self.base) * self.multiplier(step)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"base": self.base, "multiplier": self.multiplier}
