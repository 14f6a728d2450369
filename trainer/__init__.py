"""What the student learns: replay of stored views and teacher logits, with no teacher in memory.

The public API. Names are imported when they are first used: importing this package imports no TensorFlow.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

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
    importlib.import_module("pipeline.inputs.keras_file").check_keras()  # imports TensorFlow
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
