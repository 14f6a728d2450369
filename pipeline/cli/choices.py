"""Values that flags take, and their checks, without TensorFlow."""

from __future__ import annotations

import re
from typing import Final

from pipeline.errors import UserError
from pipeline.errors.text import is_printable

# Value range of a teacher's input: scale and offset for views in 0..255.
VALUE_RANGES: Final = {"0..255": (1.0, 0.0), "0..1": (1 / 255, 0.0), "-1..1": (1 / 127.5, -1.0)}
DEFAULT_SIGNATURE: Final = "serving_default"
NO_LABELS: Final = "none"  # instead of the name of a label feature
MAX_CLASS_NAME: Final = 1000  # characters

FLOAT_CODECS: Final = ("float32", "bfloat16", "float16")
CODECS: Final = (*FLOAT_CODECS, "int8", "topk:K")  # as printed in messages and --help
TOP_K: Final = re.compile(r"topk:([1-9][0-9]{0,5})")

# The embedded default.
DEMO_STORE: Final = "runs/mnist_5k/store"
DEMO_EPOCHS: Final = 10  # of views, by default


def check_codec(name: str) -> None:
    """Raises UserError for an unknown codec."""
    if not (name in FLOAT_CODECS or name == "int8" or TOP_K.fullmatch(name)):
        raise UserError(f"`codec`={name}: expected one of {', '.join(CODECS)}, such as topk:16")


def check_value_range(name: str) -> None:
    """Raises UserError for an unknown value range."""
    if name not in VALUE_RANGES:
        raise UserError(f"`teacher_value_range`={name}: expected one of {', '.join(VALUE_RANGES)}")


def check_class_name(name: str) -> None:
    """Raises UserError for a name of a class that is empty, too long or not printable."""
    if not (0 < len(name) <= MAX_CLASS_NAME and is_printable(name)):
        raise UserError(f"class name {name!a:.100}: expected 1 to {MAX_CLASS_NAME:,} printable characters")


def check_num_classes(num_classes: int, *, of: str) -> None:
    """Refuses a single class: its softmax is 1 for every logit, so every loss is 0.

    Args:
      of: the data set, teacher or store, for the error.

    Raises:
      UserError: there is one class.
    """
    if num_classes == 1:
        raise UserError(
            f"{of}: has one class, whose probability is always 1, so a student learns nothing; expected at least 2 classes"
        )
