"""BiT's rule for transfer: what follows from the number of examples, and what is fixed.

BiT-HyperRule; Kolesnikov et al. 2020, section 3.3: from the number of examples follow the length of the run and
whether examples are mixed.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import tensorflow as tf

from pipeline.views import keys
from trainer.step.schedules import Multiplier

_SMALL, _MEDIUM = 20_000, 500_000  # examples from which a data set is medium, and large
_MIXUP_ALPHA = 0.1
_MIXUP_BLOCK = 512  # views that share a ratio: a batch of the rule's
_DRAWS = 8  # pairs of uniforms for a ratio; all of them miss once in 10**14 ratios


def rule_steps(num_examples: int) -> int:
    """Steps for a data set of N examples: 500, 10,000 or 20,000."""
    return 500 if num_examples < _SMALL else 10_000 if num_examples < _MEDIUM else 20_000


def rule_mixup_alpha(num_examples: int) -> float:
    """Alpha of the mixup ratio's Beta(alpha, alpha) for N examples; 0, no mixup, where there are few."""
    return 0.0 if num_examples < _SMALL else _MIXUP_ALPHA


@dataclasses.dataclass(frozen=True)
class StaircaseDecay(Multiplier):
    """Linear warm-up from 0, then 1, and a tenth of what it was after 30, 60 and 90 % of the run.

    The warm-up takes 500 steps, but at most a fifth of the run: 100 of 500, as in the authors' code. That code
    decays its 500 steps after 200, 300 and 400; the paper's shares, and its longer runs, are these.

    Attributes:
      total_steps: steps of the run, >= 1.
    """

    total_steps: int

    @property
    def warmup_steps(self) -> int:
        """Steps of the warm-up; 0 in a run of under five steps."""
        return min(500, self.total_steps // 5)

    def formula(self, step: Any, xp: Any) -> Any:
        ramp = xp.minimum(step, self.warmup_steps) if self.warmup_steps else xp.ones_like(step)
        value = _float32(ramp, xp) / np.float32(self.warmup_steps or 1)
        for tenths in (3, 6, 9):  # in whole steps: a share as a float would be off by one now and then
            after = _float32(10 * step > tenths * self.total_steps, xp)
            value = value * (np.float32(1) - np.float32(0.9) * after)
        return value


def _float32(value: Any, xp: Any) -> Any:
    return tf.cast(value, tf.float32) if xp is tf else np.asarray(value, np.float32)


def mixup_ratios(views: np.ndarray, *, seed: int, alpha: float) -> np.ndarray:
    """Ratios from Beta(alpha, alpha), one for each block of 512 consecutive views.

    By Joehnk's method (1964): of uniform pairs, the first with `u**(1/alpha) + v**(1/alpha) <= 1` gives the
    first term's share of the sum.

    Args:
      views: int64 [n].
      seed: of the run.
      alpha: 0 (no mixup: all ratios are 1), or 0.05 to 1.

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
