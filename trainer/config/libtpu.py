"""The library through which TensorFlow reaches the TPU of this machine."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path


def use_libtpu() -> None:
    """Lets TensorFlow load the libtpu that is installed as a Python package; to be called before TensorFlow is imported.

    TPUs from v5e on need PJRT, which the first variable selects ("Training with TPU accelerators", docs.cloud.google.com).
    A variable that is set already stays. On a machine without a TPU, libtpu looks for one for minutes: do not call it there.
    """
    if (found := importlib.util.find_spec("libtpu")) is None or found.origin is None:
        return
    library = str(Path(found.origin).with_name("libtpu.so"))
    os.environ.setdefault("NEXT_PLUGGABLE_DEVICE_USE_C_API", "true")
    os.environ.setdefault("TF_PLUGGABLE_DEVICE_LIBRARY_PATH", library)
    os.environ.setdefault("TPU_LIBRARY_PATH", library)
