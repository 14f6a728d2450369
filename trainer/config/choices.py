"""Values of flags, for parsing without TensorFlow. Tests compare them with the modules that implement them."""

from __future__ import annotations

import difflib
import importlib.util
import re
from pathlib import Path
from typing import Final, Literal

from pipeline.cli.parser import check_exists
from pipeline.errors import UserError

DecayMode = Literal["scaled", "unscaled"]
Clip = Literal["none", "per_variable", "global"]

BIT_MODELS: Final = tuple(f"bit_r{depth}x{width}" for depth in (50, 101, 152) for width in (1, 2, 3))
STUDENTS: Final = ("tiny", "small", "resnet50v2", *BIT_MODELS)
# Classifiers of `tf.keras.applications`, for `keras:NAME`.
_REGNETS = ("002", "004", "006", "008", "016", "032", "040", "064", "080", "120", "160", "320")
KERAS_STUDENTS: Final = (
    *(f"ConvNeXt{size}" for size in ("Tiny", "Small", "Base", "Large", "XLarge")),
    *(f"DenseNet{depth}" for depth in (121, 169, 201)),
    *(f"EfficientNetB{number}" for number in range(8)),
    *(f"EfficientNetV2{size}" for size in ("B0", "B1", "B2", "B3", "S", "M", "L")),
    *("InceptionResNetV2", "InceptionV3", "Xception"),
    *("MobileNet", "MobileNetV2", "MobileNetV3Small", "MobileNetV3Large", "NASNetMobile", "NASNetLarge"),
    *(f"RegNet{family}{size}" for family in "XY" for size in _REGNETS),
    *(f"ResNet{depth}{version}" for version in ("", "V2") for depth in (50, 101, 152)),
    *(f"ResNetRS{depth}" for depth in (50, 101, 152, 200, 270, 350, 420)),
    *("VGG16", "VGG19"),
)
KERAS_PREFIX: Final = "keras:"
_FUNCTION: Final = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
StudentKind = Literal["built-in", "keras", "function", "path"]
PRECISIONS: Final = ("float32", "bfloat16", "float16")
ARMS: Final = ("offline", "online", "fixed", "independent", "consistent")
LIVE_ARMS: Final = ("online", "independent", "consistent")  # a teacher computes every logit
DEFAULT_ARM: Final = "offline"  # the only one that may continue online past the stored views
STRATEGIES: Final = ("default", "mirrored", "multiworker", "tpu")

BASE_BATCH_SIZE: Final = 512  # views per step that the learning rate of BiT's hyper-rule is for
TF_CONFIG_EXAMPLE: Final = (
    '{"cluster": {"worker": ["host0:2222", "host1:2222"]}, "task": {"type": "worker", "index": 0}}, '
    "with another index on each machine"
)


def student_kind(name: str, *, parameter: str = "student") -> StudentKind:
    """The kind of a student: a built-in one, `keras:NAME`, `module:function`, or the path of a Keras model.

    Raises:
      UserError: it is none of these.
    """
    if name in STUDENTS:
        return "built-in"
    if name.startswith(KERAS_PREFIX):
        _check_keras_name(name, parameter=parameter)
        return "keras"
    if _FUNCTION.fullmatch(name):
        return "function"
    if "://" in name:
        raise UserError(f"`{parameter}`={name}: expected a path on this machine; copy the model first")
    if "/" in name or name.endswith(".keras") or Path(name).exists():
        return "path"
    raise UserError(
        f"`{parameter}`={name}: expected one of {', '.join(sorted(STUDENTS))}; {KERAS_PREFIX}NAME for a model of tf.keras.applications; "
        "package.module:function; or the path of a .keras file or Keras SavedModel"
    )


def _check_keras_name(name: str, *, parameter: str) -> None:
    known = {f"{KERAS_PREFIX}{model}".lower(): f"{KERAS_PREFIX}{model}" for model in KERAS_STUDENTS}
    if name not in known.values():
        close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.75)
        hint = f"did you mean {known[close[0]]}?" if close else f"such as {KERAS_PREFIX}MobileNetV3Small"
        raise UserError(f"`{parameter}`={name}: expected a classifier of tf.keras.applications; {hint}")


def check_student_exists(name: str, *, parameter: str = "student") -> None:
    """Checks that the file of a student exists, or the package of its function, which is not imported.

    Raises:
      UserError: it does not.
    """
    kind = student_kind(name, parameter=parameter)
    package = re.split("[.:]", name)[0]
    if kind == "path":
        check_exists(f"`{parameter}`", name)
    elif kind == "function" and importlib.util.find_spec(package) is None:
        raise UserError(
            f"`{parameter}`={name}: no module {package}; run the command in the directory of the module, or add that to PYTHONPATH"
        )


def check_strategy(name: str, *, replicas: int | None, tpu: str | None) -> None:
    """Checks `--strategy` and the flags that belong to one strategy."""
    if name not in STRATEGIES:
        raise UserError(f"--strategy={name}: expected one of {', '.join(STRATEGIES)}")
    for flag, value, owner in (("replicas", replicas, "mirrored"), ("tpu", tpu, "tpu")):
        if value is not None and name != owner:
            raise UserError(
                f"--{flag}={value}: needs --strategy={owner}, got --strategy={name}; omit it, or change --strategy"
            )
