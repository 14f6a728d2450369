"""What a comparison's files hold, for the checked parser: a result may come from anywhere, as by `--from`.

Figures that were not measured are null, and older results lack some; a figure that is there is a number.
"""

from __future__ import annotations

from typing import Annotated, Any, NotRequired, TypedDict

from pipeline.storage.checked_json import AtLeast, Count

Figure = float | None
Text = str | None
_Seconds = Annotated[float, AtLeast(1e-12)]


class History(TypedDict, total=False):
    """An evaluation on the way."""

    step: Figure
    epoch: Figure
    loss: Figure
    top1: Figure
    agreement: Figure
    training_loss: Figure
    learning_rate: Figure


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
    history: NotRequired[list[History] | None]
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
    """What replaying saves."""

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


class StoreRow(TypedDict, total=False):
    """The store, of which only the digest is compared."""

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
    store: NotRequired[StoreRow | None]
    recipe: NotRequired[dict[str, Any] | None]
    created: NotRequired[Text]
    command: NotRequired[Text]
    eval_split: NotRequired[Text]
    eval_images: NotRequired[Figure]
    eval_unlabeled: NotRequired[Figure]
    classes: NotRequired[Figure]


class CostFile(TypedDict):
    """cost.json, which `trainer.comparison.measure` writes."""

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
    """Of a view in views.png."""

    view: Count
    example: Count
    partner_example: Count
    ratio: float
    teacher: _Likely


# Its key is a word of Python's.
_Likely = TypedDict("_Likely", {"class": str, "probability": float})
