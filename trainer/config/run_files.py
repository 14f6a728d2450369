"""What the files of a run hold, and their checked reading: a run's directory may come from anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict, cast

from pipeline.storage.checked_json import AtLeast, Count, Positive, build, parse_json, read_json, read_text

CONFIG_FILE, RESULT_FILE, METRICS_FILE = "config.json", "result.json", "metrics.jsonl"
COMPARISON_FILE, RUNS_DIRECTORY = "comparison.json", "runs"  # in the directory of a comparison
TRAIN = "train"  # kind of the lines of training steps; the others are `eval_SPLIT`
# Of a file's text. A metrics file of a million lines has 150 MB.
FILE_LIMIT, METRICS_LIMIT = 8 << 20, 1 << 30


class Evaluation(TypedDict):
    """Figures of a student on a split."""

    examples: Positive
    student_top1: float | None
    teacher_top1: float | None
    agreement: float
    distillation_loss: float


class RunFlags(TypedDict):
    """Flags in config.json, those that are read again."""

    seed: Count
    precision: str
    epochs: float | str | None
    steps: NotRequired[int | None]
    arm: NotRequired[str]
    store: str


class RunRecipe(TypedDict):
    """The recipe in config.json."""

    batch_size: Positive
    epochs: NotRequired[float | str | None]


class Length(TypedDict):
    """The length in config.json."""

    num_examples: Positive
    online_from: Count
    steps: NotRequired[Positive | Literal["inf"]]
    batch_size: NotRequired[Positive]


class RunConfig(TypedDict):
    """config.json."""

    flags: RunFlags
    recipe: RunRecipe
    recipe_name: str
    temperature: float
    warmup_steps: Count
    length: Length


class RunResult(TypedDict):
    """result.json of a run."""

    steps: Count
    spec: str
    epochs: float
    student: str
    parameters: int
    evaluation: dict[str, Evaluation]
    eval_split: str | None
    best: NotRequired[dict[str, Any] | None]


class Line(TypedDict):
    """Any line of metrics.jsonl."""

    step: Count
    kind: str


def parse_step(text: str) -> Line:
    """The step and kind of a line of metrics.jsonl.

    Raises:
      ValueError: it is damaged.
    """
    return build(Line, parse_json(text))


class TrainLine(Line):
    """Of a training step."""

    loss: float
    learning_rate: float
    views_per_second: NotRequired[Annotated[float, AtLeast(1e-9)]]


class EvalLine(Line, Evaluation):
    """Of an evaluation."""


def read_config(workdir: Path) -> RunConfig:
    """A run's config.json.

    Raises:
      OSError: it is not there or cannot be read.
      ValueError: it is damaged.
    """
    return build(RunConfig, read_json(workdir / CONFIG_FILE, limit=FILE_LIMIT))


def read_result(workdir: Path) -> RunResult:
    """A run's result.json; raises as `read_config` does."""
    return build(RunResult, read_json(workdir / RESULT_FILE, limit=FILE_LIMIT))


def parse_line(text: str) -> dict[str, Any]:
    """A line of metrics.jsonl.

    Raises:
      ValueError: it is damaged.
    """
    line = parse_step(text)
    return cast(dict[str, Any], build(TrainLine if line["kind"] == TRAIN else EvalLine, line))


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """All lines of a run's metrics.jsonl; raises as `read_config` does."""
    return [parse_line(line) for line in read_text(workdir / METRICS_FILE, limit=METRICS_LIMIT).splitlines()]
