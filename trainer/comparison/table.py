"""The main figures of a comparison's result.json as text for a terminal."""

from __future__ import annotations

from pipeline.cli.units import counted
from pipeline.errors.text import printable
from pipeline.pages.figures import KINDS
from trainer.comparison.result_file import Result, Row
from trainer.run.evaluation import accuracy_text


def comparison_table(result: Result) -> str:
    """Arms, pairs and costs of a result."""
    rows = [("arm", "epochs", "runs", f"top-1 ({result.get('eval_split')})", "agreement")]
    for arm in result["arms"]:
        rows.append(
            (
                arm["arm"],
                f"{arm['epochs']:,}",
                KINDS["seeds"](arm["seeds"]),
                _spread(arm["top1_mean"], arm["top1_std"]),
                _spread(arm["agreement_mean"], arm["agreement_std"]),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows
    ]
    if unlabeled := result.get("eval_unlabeled"):
        lines.append(
            f"top-1 excludes {unlabeled:,} unlabeled images of {_number(result.get('eval_images'), ',')}"
        )
    for teacher in result.get("teachers") or []:
        lines.append(
            f"teacher {teacher.get('path')} at {teacher.get('image_size')} pixels, weight {_number(teacher.get('weight'), '.3g')}: "
            f"{accuracy_text(teacher.get('top1'))}"
        )
    if result.get("teachers"):
        lines.append(
            f"mean of the teachers' logits: {accuracy_text((result.get('teacher') or {}).get('top1'))}"
        )
    lines += [_pair(pair) for pair in result["pairs"]]
    cost = result.get("cost") or {}
    if seconds := cost.get("seconds_a_step"):
        parts = ", ".join(f"{name} {1000 * value:.1f}" for name, value in seconds.items())
        lines.append(
            f"milliseconds per step: {parts}; online against offline: {_number(cost.get('saving'), '+.0%')}"
        )
        rows_a_step = cost.get("teacher_rows_a_step")
        if rows_a_step != cost.get("batch_size") and not result.get("teachers"):
            lines.append(
                f"the online teacher computes {rows_a_step} rows for {cost.get('batch_size')} views, because the teacher "
                f"batch size of the store is {cost.get('teacher_batch_size')}"
            )
    return "\n".join(printable(line.rstrip()) for line in lines)


def _number(value: float | None, form: str) -> str:
    """A figure that an older or foreign result may lack."""
    return "n/a" if value is None else format(value, form)


def _spread(mean: float | None, deviation: float | None) -> str:
    return accuracy_text(mean) if deviation is None else f"{mean:.2%} +- {deviation:.2%}"


def _pair(pair: Row) -> str:
    loss, weights = pair.get("largest_loss_difference"), pair.get("weights_distance_relative")
    if loss == 0 and weights == 0:
        curves = "losses and weights are bit-equal"
    elif loss is None:
        curves = f"no step was logged by both; relative weight distance {_number(weights, '.3g')}"
    else:
        curves = f"largest loss difference {loss:.3g}, relative weight distance {_number(weights, '.3g')}"
    text = (
        f"{pair['a']} - {pair['b']}, seed {pair['seed']}, {counted(pair['epochs'], 'epoch')}: {curves}; students agree on "
        f"{_number(pair.get('agreement'), '.2%')} of the images"
    )
    if pair.get("top1_interval") is None:
        return text
    difference, low, high = (
        _number(value, "+.2%") for value in (pair.get("top1_difference"), *pair["top1_interval"])
    )
    return f"{text}, top-1 {difference} ({low} to {high})"
