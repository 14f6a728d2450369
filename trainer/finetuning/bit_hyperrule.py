"""BiT-HyperRule: hyperparameters of a transfer (Kolesnikov et al. 2020, section 3.3).

The number of examples determines the length of the run and whether examples are mixed. The schedule is fixed.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import tensorflow as tf

from pipeline.views import keys
from trainer.step.schedules import Multiplier, ramp

_SMALL, _MEDIUM = 20_000, 500_000  # smallest numbers of examples of a medium and a large data set
_MIXUP_ALPHA = 0.1
_MIXUP_BLOCK = 512  # views with the same ratio: one batch of the rule
_DRAWS = 8  # pairs of uniforms per ratio; all are rejected once in 10**14 ratios


def rule_steps(num_examples: int) -> int:
    """Number of steps for N examples: 500, 10,000 or 20,000."""
    return 500 if num_examples < _SMALL else 10_000 if num_examples < _MEDIUM else 20_000


def rule_mixup_alpha(num_examples: int) -> float:
    """Alpha of the mixup ratio's Beta(alpha, alpha) for N examples; 0 (no mixup) for a small data set."""
    return 0.0 if num_examples < _SMALL else _MIXUP_ALPHA


@dataclasses.dataclass(frozen=True)
class StaircaseDecay(Multiplier):
    """Linear warm-up from 0 to 1, then a decay by 10 after 30, 60 and 90 % of the run.

    The warm-up takes 500 steps, but at most a fifth of the run: 100 of 500 steps, as in the authors' code. That code
    decays a run of 500 steps after 200, 300 and 400 steps; the fractions here are the paper's.

    Attributes:
      total_steps: Steps of the run, >= 1.
    """

    total_steps: int

    @property
    def warmup_steps(self) -> int:
        """Steps of the warm-up; 0 for a run of fewer than five steps."""
        return min(500, self.total_steps // 5)

    def formula(self, step: tf.Tensor) -> tf.Tensor:
        value = ramp(step, self.warmup_steps)
        for tenths in (3, 6, 9):  # in integers: a float fraction would sometimes be off by one step
            after = tf.cast(10 * step > tenths * self.total_steps, tf.float32)
            value = value * (np.float32(1) - np.float32(0.9) * after)
        return value


def mixup_ratios(views: np.ndarray, *, seed: int, alpha: float) -> np.ndarray:
    """Draws mixup ratios from Beta(alpha, alpha), one per block of 512 consecutive views.

    Joehnk's method (1964): the first pair of uniforms with `u**(1/alpha) + v**(1/alpha) <= 1` is accepted, and the
    ratio is the first term divided by the sum.

    Args:
      views: View indices, int64 [n].
      alpha: 0 (no mixup, all ratios are 1), or 0.05 to 1.

    Returns:
      float32 [n] in 0..1.
    """
    if not alpha:
        return np.ones(len(views), np.float32)
    blocks, inverse = np.unique(np.asarray(views, np.int64) // _MIXUP_BLOCK, return_inverse=True)
    key = keys.stream_key(seed, "finetune_mixup")
    ratios = np.ones(len(blocks))
    for row, block in enumerate(blocks.tolist()):
        words = keys.random_words(key, block, 1, blocks=2 * _DRAWS // keys.WORDS_PER_BLOCK)
        pairs = (1.0 - keys.unit_float64(words)).reshape(_DRAWS, 2) ** (1 / alpha)  # [draws, 2] in (0, 1]
        total = pairs.sum(axis=1)
        if (fits := total <= 1).any():
            first = int(np.argmax(fits))
            ratios[row] = pairs[first, 0] / total[first]
    return ratios[inverse].astype(np.float32)
