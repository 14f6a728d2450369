"""What the teacher saw: seeded views of a data set and the teacher's logits for them, stored once.

The public API. Names are imported when they are first used: importing this package imports no TensorFlow.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.api import Store, open_store, sample_views
    from pipeline.errors import DataError, UserError
    from pipeline.inputs.teacher import Teacher
    from pipeline.pages.views import View
    from pipeline.views.policies.base import ViewPolicy
    from pipeline.views.policies.inception import Inception
    from pipeline.views.policies.light import Light

_MODULES = {
    "DataError": "pipeline.errors",
    "Inception": "pipeline.views.policies.inception",
    "Light": "pipeline.views.policies.light",
    "Store": "pipeline.api",
    "Teacher": "pipeline.inputs.teacher",
    "UserError": "pipeline.errors",
    "View": "pipeline.pages.views",
    "ViewPolicy": "pipeline.views.policies.base",
    "open_store": "pipeline.api",
    "sample_views": "pipeline.api",
}
__all__ = [
    "DataError",
    "Inception",
    "Light",
    "Store",
    "Teacher",
    "UserError",
    "View",
    "ViewPolicy",
    "open_store",
    "sample_views",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
