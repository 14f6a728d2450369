"""Values of flags, for parsing without TensorFlow. Tests compare them with the modules that implement them."""

from __future__ import annotations

from typing import Final, Literal

from pipeline.errors import UserError

DecayMode = Literal["scaled", "unscaled"]
Clip = Literal["none", "per_variable", "global"]

BIT_MODELS: Final = tuple(f"bit_r{depth}x{width}" for depth in (50, 101, 152) for width in (1, 2, 3))
STUDENTS: Final = ("tiny", "small", "resnet50v2", *BIT_MODELS)
PRECISIONS: Final = ("float32", "bfloat16")
ARMS: Final = ("offline", "online", "fixed", "independent", "consistent")
LIVE_ARMS: Final = ("online", "independent", "consistent")  # a teacher computes every logit
DEFAULT_ARM: Final = "offline"  # the only one that may continue online past the stored views
STRATEGIES: Final = ("default", "mirrored", "multiworker", "tpu")

BASE_BATCH_SIZE: Final = 512  # views per step that the learning rate of BiT's hyper-rule is for
TF_CONFIG_EXAMPLE: Final = (
    '{"cluster": {"worker": ["host0:2222", "host1:2222"]}, "task": {"type": "worker", "index": 0}}, '
    "with another index on each machine"
)


def check_student(name: str) -> None:
    """Raises UserError unless a student of that name exists."""
    if name not in STUDENTS:
        raise UserError(f"--student={name}: expected one of {', '.join(sorted(STUDENTS))}")


def check_strategy(name: str, *, replicas: int | None, tpu: str | None) -> None:
    """Checks `--strategy` and the flags that belong to one strategy."""
    if name not in STRATEGIES:
        raise UserError(f"--strategy={name}: expected one of {', '.join(STRATEGIES)}")
    for flag, value, owner in (("replicas", replicas, "mirrored"), ("tpu", tpu, "tpu")):
        if value is not None and name != owner:
            raise UserError(
                f"--{flag}={value}: needs --strategy={owner}, got --strategy={name}; omit it, or change --strategy"
            )
