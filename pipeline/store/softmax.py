"""Softmax of stored logits in float64, and the error that a codec makes in it."""

from __future__ import annotations

import numpy as np


def log_softmax(logits: np.ndarray, temperature: float) -> np.ndarray:
    """Computes log softmax(logits / temperature) over the last axis in float64."""
    scaled = logits.astype(np.float64) / temperature
    scaled -= scaled.max(axis=-1, keepdims=True)
    return scaled - np.log(np.exp(scaled).sum(axis=-1, keepdims=True))


def fidelity(logits: np.ndarray, decoded: np.ndarray, temperature: float) -> tuple[float, float]:
    """Error of a codec: sum of KL(teacher || decoded) in nats, and largest logit error.

    Args:
      logits: logits of the teacher, float32 [n, C].
      decoded: decoded logits, float32 [n, C].
      temperature: temperature of both softmaxes.
    """
    log_p, log_q = log_softmax(logits, temperature), log_softmax(decoded, temperature)
    kl = np.exp(log_p) * (log_p - log_q)
    # Rounding may make the sum slightly negative.
    return max(float(kl.sum()), 0.0), float(np.abs(logits - decoded).max())
