"""The files of a comparison, and their checked reading: a result may come from anywhere, for example through `--from`.

Figures that were not measured are null, and older results lack some. A figure that is present is a number.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

from pipeline.errors import DataError, UserError
from pipeline.storage.checked_json import AtLeast, Count, build, read_json
from trainer.config.run_files import RESULT_FILE

FORMAT = 1
RESULT_LIMIT = 256 << 20  # bytes of the file; its curves are thinned

Row = dict[str, Any]
Result = dict[str, Any]
Figure = float | None
Text = str | None
_Seconds = Annotated[float, AtLeast(1e-12)]


class RunRow(TypedDict):
    """A run."""

    arm: str
    seed: int
    epochs: Annotated[float, AtLeast(0)]
    steps: NotRequired[Figure]
    warmup_steps: NotRequired[Figure]
    batch_size: NotRequired[Figure]
    directory: NotRequired[Text]
    top1: NotRequired[Figure]
    agreement: NotRequired[Figure]
    distillation_loss: NotRequired[Figure]
    seconds: NotRequired[Figure]
    teacher_passes: NotRequired[Figure]
    seconds_a_step: NotRequired[Figure]
    history: NotRequired[list[dict[str, Figure]] | None]  # evaluations during training
    losses: NotRequired[list[tuple[Figure, Figure]] | None]
    learning_rates: NotRequired[list[tuple[Figure, Figure]] | None]


class PairRow(TypedDict):
    """Two runs of the same seed and length."""

    a: str
    b: str
    seed: int
    epochs: Annotated[float, AtLeast(0)]
    largest_loss_difference: NotRequired[Figure]
    largest_loss_difference_step: NotRequired[Figure]
    mean_loss: NotRequired[Figure]
    weights_distance: NotRequired[Figure]
    weights_distance_relative: NotRequired[Figure]
    weights_largest_difference: NotRequired[Figure]
    agreement: NotRequired[Figure]
    top1_difference: NotRequired[Figure]
    top1_interval: NotRequired[tuple[Figure, Figure] | None]


class ArmRow(TypedDict):
    """An arm over its seeds."""

    arm: str
    epochs: Annotated[float, AtLeast(0)]
    seeds: NotRequired[list[int] | None]
    top1_mean: NotRequired[Figure]
    top1_std: NotRequired[Figure]
    agreement_mean: NotRequired[Figure]
    agreement_std: NotRequired[Figure]
    loss_mean: NotRequired[Figure]


class Cost(TypedDict, total=False):
    """Costs online and offline."""

    seconds_a_step: dict[str, _Seconds] | None
    seconds_a_step_spread: dict[str, tuple[float, float]] | None
    seconds_a_step_in_runs: dict[str, float] | None
    batch_size: Figure
    teacher_batch_size: Figure
    teacher_rows_a_step: Figure
    teacher_passes: dict[str, Figure] | None
    store_bytes: Figure
    bytes_a_view: Figure
    precompute_seconds: Figure
    saving: Figure
    limit: Figure
    teacher_in_step: Figure
    break_even_students: Figure
    how: Text


class Teacher(TypedDict, total=False):
    """The teacher."""

    path: Text
    parameters: Figure
    top1: Figure


class TeacherRow(TypedDict, total=False):
    """The teacher of one of several stores."""

    path: Text
    store: Text
    digest: Text
    weight: Figure
    image_size: Figure
    top1: Figure


class StoreRow(TypedDict, total=False):
    """The store; only its digest is compared."""

    digest: Text
    spec: dict[str, Any] | None


class ResultFile(TypedDict):
    """result.json of a comparison."""

    format: int
    runs: list[RunRow]
    pairs: NotRequired[list[PairRow] | None]
    arms: NotRequired[list[ArmRow] | None]
    cost: NotRequired[Cost | None]
    teacher: NotRequired[Teacher | None]
    teachers: NotRequired[list[TeacherRow] | None]
    store: NotRequired[StoreRow | None]
    recipe: NotRequired[dict[str, Any] | None]
    created: NotRequired[Text]
    command: NotRequired[Text]
    eval_split: NotRequired[Text]
    eval_images: NotRequired[Figure]
    eval_unlabeled: NotRequired[Figure]
    no_accuracy: NotRequired[Text]
    classes: NotRequired[Figure]


class CostFile(TypedDict):
    """cost.json, written by `trainer.comparison.measure`."""

    seconds_a_step: _Parts
    seconds_a_step_spread: NotRequired[dict[str, tuple[float, float]] | None]
    teacher_parameters: int | None
    how: str


class _Parts(TypedDict):
    teacher: _Seconds
    student: _Seconds
    input: _Seconds
    offline: _Seconds
    online: _Seconds


class ShownFacts(TypedDict):
    """Facts about a view in views.png."""

    view: Count
    example: Count
    partner_example: Count
    ratio: float
    teacher: _Likely


# The functional form, because `class` is a keyword of Python.
_Likely = TypedDict("_Likely", {"class": str, "probability": float})


def load_result(workdir: Path) -> Result:
    """Reads the result.json of a comparison.

    Raises:
      UserError: the file is missing, or is no result of a comparison.
      DataError: the file is damaged or has another format.
    """
    path = workdir / RESULT_FILE
    try:
        result: Result = read_json(path, limit=RESULT_LIMIT)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"{workdir}: {RESULT_FILE} is missing; finish the comparison with `python -m trainer.compare`"
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: not JSON ({error}); rerun the comparison (finished runs are not trained again)"
        ) from error
    if not isinstance(result, dict) or not isinstance(result.get("runs"), list) or not result["runs"]:
        raise UserError(
            f"{path}: not the result of a comparison; expected a directory written by `trainer.compare`"
        )
    if result.get("format") != FORMAT:
        raise DataError(
            f"{path}: format {result.get('format')}, expected {FORMAT}; rerun the comparison with this version"
        )
    try:
        build(ResultFile, result)
    except ValueError as error:
        raise DataError(
            f"{path}: damaged ({error}); rerun the comparison (finished runs are not trained again)"
        ) from error
    return result
