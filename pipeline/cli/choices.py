"""The values that flags take, for parsing without TensorFlow."""

from __future__ import annotations

import re
from typing import Final

from pipeline.errors import UserError

# How a teacher wants its input: views in 0..255 are multiplied by the first number, then the second is added.
VALUE_RANGES: Final = {"0..255": (1.0, 0.0), "0..1": (1 / 255, 0.0), "-1..1": (1 / 127.5, -1.0)}
DEFAULT_SIGNATURE: Final = "serving_default"

FLOAT_CODECS: Final = ("float32", "bfloat16", "float16")
CODECS: Final = (*FLOAT_CODECS, "int8", "topk:K")  # as messages and --help spell them
TOP_K: Final = re.compile(r"topk:([1-9][0-9]{0,5})")

# The embedded default.
DEMO_STORE: Final = "runs/mnist_5k/store"
DEMO_EPOCHS: Final = 10  # of views that the commands store when nothing else is asked


def check_codec(name: str) -> None:
    """Raises UserError unless there is a codec of that name."""
    if not (name in FLOAT_CODECS or name == "int8" or TOP_K.fullmatch(name)):
        raise UserError(f"--codec={name}: expected one of {', '.join(CODECS)}, such as topk:16")


def check_value_range(name: str) -> None:
    """Raises UserError unless there is a value range of that name."""
    if name not in VALUE_RANGES:
        raise UserError(f"--teacher_value_range={name}: expected one of {', '.join(VALUE_RANGES)}")


def check_num_classes(num_classes: int, *, of: str) -> None:
    """Refuses a single class: its softmax is 1 for every logit, so every loss is 0.

    Raises:
      UserError: there is one class; `of` names what has it.
    """
    if num_classes == 1:
        raise UserError(
            f"{of}: one class; its probability is always 1, so a student has nothing to learn; expected 2 classes or more"
        )
