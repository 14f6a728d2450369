"""Lines that the precompute prints before and after the work."""

from __future__ import annotations

from pipeline.cli.units import counted, three_digits
from pipeline.precomputing.options import PrecomputeOptions
from pipeline.precomputing.progress import records_text, split_records
from pipeline.precomputing.shard_tasks import SHARD_SECONDS
from pipeline.precomputing.store_session import StoreSession
from pipeline.store.layout import VIEWS_SPLIT
from pipeline.store.metadata import load_manifest
from pipeline.store.shards import ShardTask
from pipeline.store.spec import Spec

_KL_ROUNDING = 1e-14  # a mean KL sums differences of float64 logarithms


def eval_splits_text(options: PrecomputeOptions) -> str:
    """One line on the evaluated splits and their overlap with the training split."""
    dataset = options.datasets[VIEWS_SPLIT]
    parts, held_out = [], False
    for name in options.eval_splits:
        evaluated = options.datasets[name]
        overlap = evaluated.overlap(dataset)
        held_out |= not overlap
        shared = f", {overlap:,} of them in --split={dataset.split}" if overlap else ""
        parts.append(f"{name} ({evaluated.num_examples:,} examples{shared})")
    line = f"evaluation splits: {'; '.join(parts) or 'none'}"
    if options.eval_splits and not held_out:
        line += (
            "; none is held out, so students will have no held-out accuracy; train on one part and evaluate on the rest, "
            "such as --split=train[:90%] --eval_splits=train[90%:]"
        )
    return line


def found_text(finished: list[ShardTask], tasks: list[ShardTask], options: PrecomputeOptions) -> str | None:
    """One line on the work of earlier runs, or None.

    Args:
      finished: shards that an interrupted run finished.
      tasks: all shards that are not published, and published ones to repair.
    """
    num_examples = options.spec.num_examples
    published = next((task.first for task in tasks if task.split == VIEWS_SPLIT and not task.sha256), None)
    parts = []
    if published:
        parts.append(f"{published // num_examples:,} of {counted(options.epochs, 'epoch')} are published")
    if finished:
        parts.append(
            f"{counted(len(finished), 'finished shard')} of an interrupted run "
            f"({records_text(split_records(finished))}) will be published without recomputing"
        )
    return f"found: {'; '.join(parts)}" if parts else None


def work_text(tasks: list[ShardTask], *, seconds_per_batch: float, options: PrecomputeOptions) -> str:
    """The amount of work, with a second line if shards take long.

    Args:
      tasks: shards to be computed.
      seconds_per_batch: teacher seconds per batch.
    """
    records = split_records(tasks)
    rate = options.spec.teacher.batch_size / seconds_per_batch
    longest = max(task.records for task in tasks) / rate
    minutes = sum(records.values()) / rate / 60
    text = (
        f"to compute: {records_text(records)}, in {counted(len(tasks), 'shard')}; teacher alone: {rate:,.0f} images/s, "
        f"{minutes:,.1f} min"
    )
    if longest > SHARD_SECONDS:
        shorter = max(int(SHARD_SECONDS * rate), 1)
        text += (
            f"\nEach shard needs about {longest / 60:.0f} min of teacher time, all lost if its worker dies; "
            f"--views_per_shard={shorter} makes it about {SHARD_SECONDS // 60}"
        )
    return text


def summary_text(
    session: StoreSession, spec: Spec, counters: dict[str, int] | None, *, seconds: float
) -> str:
    """The size of the store, the cost of its codec, and the rates of this run.

    Args:
      counters: sums over all workers: `views`, `bytes`, `microseconds`, `teacher_microseconds`, `input_microseconds`; None
        if the runner reports none; empty if nothing was computed.
      seconds: duration of the work.
    """
    views = load_manifest(session.path, digest=spec.digest())[VIEWS_SPLIT]
    text = (
        f"store: {session.location}: {counted(views.records, 'view')} "
        f"({counted(views.records // spec.num_examples, 'epoch')} of {counted(spec.num_examples, 'example')}), "
        f"{views.bytes / 1e6:,.1f} MB, {views.bytes / views.records:.0f} bytes per view\n"
        f"codec {codec_error_text(spec.codec, **views.fidelity(), temperature=spec.temperature)}"
    )
    if counters is None:
        return (
            f"{text}\nthis run: {seconds:.1f} s; this runner reports no counters, so its rates are not known"
        )
    if written := counters.get("views", 0):
        spent = max(counters["microseconds"], 1)
        text += (
            f"\nthis run: {written:,} images in {seconds:.1f} s, {written / seconds:,.0f} images/s; worker time: "
            f"{counters['teacher_microseconds'] / spent:.0%} in the teacher, "
            f"{counters['input_microseconds'] / spent:.0%} waiting for crops"
        )
    return text


def codec_error_text(codec: str, *, mean_kl: float, max_logit_error: float, temperature: float) -> str:
    """One line on the error of a codec.

    Args:
      mean_kl: mean KL(teacher || decoded) in nats.
      max_logit_error: largest absolute logit error.
      temperature: temperature of the KL.
    """
    text = f"{codec}: mean KL {kl_text(mean_kl)} nats at T = {temperature:g}, "
    error = error_text(max_logit_error)
    if (kept := kept_logits(codec)) is None:
        return f"{text}largest logit error {error}"
    return (
        f"{text}its total cost; it keeps the {kept:,} largest logits and the sum of the others, which differ from their mean "
        f"by up to {error}, as intended"
    )


def kept_logits(codec: str) -> int | None:
    """K of the codec `topk:K`, which stores no other logit; None for other codecs."""
    name, _, count = codec.partition(":")
    return int(count) if name == "topk" and count.isdecimal() else None


def without_rounding(kl: float) -> float:
    """A mean KL, or 0 if it is only rounding, which may be negative."""
    return 0.0 if kl < _KL_ROUNDING else kl


def kl_text(nats: float) -> str:
    """A mean KL for the terminal."""
    return f"{nats:.1e}" if without_rounding(nats) else "0"


def error_text(value: float) -> str:
    """An absolute error for the terminal."""
    return three_digits(value) if value >= 1e-3 else f"{value:.2g}"
