"""What the student learns: replay of stored views and teacher logits, with no teacher in memory.

The public API. Names are imported when they are first used: importing this package imports no TensorFlow.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pipeline.cli.environment import KERAS_VARIABLE
from pipeline.errors import UserError

if TYPE_CHECKING:
    from trainer.models import build_student
    from trainer.step.distiller import Distiller
    from trainer.step.loss import DistillationLoss

_MODULES = {
    "DistillationLoss": "trainer.step.loss",
    "Distiller": "trainer.step.distiller",
    "build_student": "trainer.models",
}
__all__ = ["DistillationLoss", "Distiller", "build_student"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _check_keras()
    return getattr(importlib.import_module(_MODULES[name]), name)


def _check_keras() -> None:
    """Refuses Keras 3, which `tf.keras` is in a program of the user's on TensorFlow 2.16 and later."""
    import tensorflow as tf  # takes seconds

    if (version := getattr(tf.keras, "__version__", "2")).startswith("3"):  # tf-keras has no such attribute
        raise UserError(
            f"tf.keras is Keras {version}, expected Keras 2: install tf-keras, and set {KERAS_VARIABLE}=1 before TensorFlow is "
            "imported"
        )


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
