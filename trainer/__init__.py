"""What the student learns: replay of stored views and teacher logits, with no teacher in memory.

The public API. Names are imported when they are first used: importing this package imports no TensorFlow.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.models import build as build_student
    from trainer.step.distiller import Distiller

_PLACES = {"Distiller": ("trainer.step.distiller", "Distiller"), "build_student": ("trainer.models", "build")}
__all__ = ["Distiller", "build_student"]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _PLACES[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
