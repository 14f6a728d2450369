"""Files of a run and their checked reading; a run's directory may come from an untrusted source."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict, cast

from pipeline.storage.checked_json import AtLeast, Count, Positive, build, parse_json, read_json, read_text

CONFIG_FILE, RESULT_FILE, METRICS_FILE = "config.json", "result.json", "metrics.jsonl"
STUDENT_DIRECTORY = "student"  # after the last step, which is the result of function matching
BEST_DIRECTORY = "student_best"  # at the best evaluation
COMPARISON_FILE, RUNS_DIRECTORY = "comparison.json", "runs"  # in the directory of a comparison
TRAIN = "train"  # kind of training lines; the other kinds are `eval_SPLIT`
# Bytes. A metrics file of a million lines has 150 MB.
FILE_LIMIT, METRICS_LIMIT = 8 << 20, 1 << 30


class TeacherFigures(TypedDict):
    """Figures of the teacher of one of several stores."""

    store: str | list[str]
    store_weights: NotRequired[list[float] | None]
    image_size: Positive
    top1: float | None
    agreement: float  # of the student with this teacher


class Evaluation(TypedDict):
    """Evaluation of a student on all images of a split. Shares and accuracies are 0 to 1."""

    examples: Positive
    unlabeled: NotRequired[Count]  # images without a label, which the accuracies exclude
    student_top1: float | None  # None if no image is labeled
    teacher_top1: float | None
    agreement: float  # share of images for which student and teacher predict the same class
    distillation_loss: (
        float  # mean KL(teacher || student) at the run's temperature, in nats, scaled as in training
    )
    calibration_error: NotRequired[float | None]  # of the student, see `trainer.run.predictions`
    teachers: NotRequired[list[TeacherFigures]]  # of several stores; the other figures are of their mean


class RunFlags(TypedDict):
    """Flags in config.json that are read again."""

    seed: Count
    precision: str
    epochs: float | str | None
    steps: NotRequired[int | None]
    arm: NotRequired[str]
    store: str | list[str]
    store_weights: NotRequired[list[float] | None]
    image_size: NotRequired[Positive | None]


class RunRecipe(TypedDict):
    """Recipe in config.json."""

    batch_size: Positive
    epochs: NotRequired[float | str | None]
    temperature_squared: NotRequired[bool]


class Length(TypedDict):
    """Length in config.json."""

    num_examples: Positive
    online_from: Count
    steps: NotRequired[Positive | Literal["inf"]]
    batch_size: NotRequired[Positive]


class RunConfig(TypedDict):
    """Content of config.json."""

    flags: RunFlags
    recipe: RunRecipe
    recipe_name: str
    temperature: float
    warmup_steps: Count
    length: Length


class RunResult(TypedDict):
    """Content of a run's result.json."""

    steps: Count
    spec: str
    epochs: float
    student: str
    parameters: int
    evaluation: dict[str, Evaluation]
    eval_split: str | None
    best: NotRequired[dict[str, Any] | None]
    no_accuracy: NotRequired[str | None]


class Line(TypedDict):
    """Any line of metrics.jsonl."""

    step: Count
    kind: str


def parse_step(text: str) -> Line:
    """Parses step and kind of a line of metrics.jsonl; raises ValueError if it is damaged."""
    return build(Line, parse_json(text))


class TrainLine(Line):
    """Training line of metrics.jsonl."""

    loss: NotRequired[float]  # not of a skipped step whose loss was not finite
    learning_rate: float
    views_per_second: NotRequired[Annotated[float, AtLeast(1e-9)]]


class EvalLine(Line, Evaluation):
    """Evaluation line of metrics.jsonl."""


def read_config(workdir: Path) -> RunConfig:
    """Reads a run's config.json.

    Raises:
      OSError: the file is missing or cannot be read.
      ValueError: the file is damaged.
    """
    return build(RunConfig, read_json(workdir / CONFIG_FILE, limit=FILE_LIMIT))


def read_result(workdir: Path) -> RunResult:
    """Reads a run's result.json; raises the same errors as `read_config`."""
    return build(RunResult, read_json(workdir / RESULT_FILE, limit=FILE_LIMIT))


def parse_line(text: str) -> dict[str, Any]:
    """Parses a line of metrics.jsonl; raises ValueError if it is damaged."""
    line = parse_step(text)
    return cast(dict[str, Any], build(TrainLine if line["kind"] == TRAIN else EvalLine, line))


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """Reads all lines of a run's metrics.jsonl; raises the same errors as `read_config`."""
    return [parse_line(line) for line in read_text(workdir / METRICS_FILE, limit=METRICS_LIMIT).splitlines()]


def stores_of(flags: RunFlags) -> list[str]:
    """Locations of the stores of a run."""
    return [flags["store"]] if isinstance(flags["store"], str) else flags["store"]
