"""Cost estimates for a precompute: size, hours, and the number of students after which it has paid for itself.

A student trained online runs the teacher on each of its views; a student trained on the store does not. All other costs are
the same, so the precompute pays for itself after `teacher rate / precompute rate` students, which is 1 if it only waits for
the teacher.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from pipeline.cli.choices import check_num_classes
from pipeline.cli.units import bytes_text, counted
from pipeline.errors import UserError
from pipeline.flags.precompute import view_recipe_of
from pipeline.inputs.dataset import Dataset
from pipeline.precomputing.break_even import break_even_students
from pipeline.precomputing.options import PrecomputeOptions, find_eval_splits
from pipeline.precomputing.reports import error_text, kept_logits, kl_text
from pipeline.precomputing.shard_tasks import SHARD_SECONDS, cut_shards
from pipeline.precomputing.worker import PrecomputeJob, ShardWorker
from pipeline.store.codecs import Codec, make_codec
from pipeline.store.layout import VIEWS_SPLIT
from pipeline.store.shards import MAX_SHARDS, estimated_bytes
from pipeline.store.softmax import fidelity

_CODECS = ("float32", "bfloat16", "float16", "int8", "topk:10", "topk:100")
_MOST_BATCHES = 4096  # of a calibration, where the teacher is fast


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
    """Rates of one worker in views per second.

    Attributes:
      teacher: rate of the teacher alone.
      precompute: rate with reading, rendering and encoding.
      measured: whether the rates were measured on this machine.
    """

    teacher: float
    precompute: float
    measured: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """The store that is planned.

    Attributes:
      dataset: name of the data set.
      num_examples: N.
      num_classes: C.
      epochs: number of epochs.
      eval_views: number of evaluation crops.
      views_per_shard: largest number of views per shard.
      codec: name of the codec.
      temperature: distillation temperature.
    """

    dataset: str
    num_examples: int
    num_classes: int
    epochs: int
    eval_views: int
    views_per_shard: int
    codec: str
    temperature: float

    @property
    def views(self) -> int:
        """Number of training views."""
        return self.epochs * self.num_examples


def calibrate(worker: ShardWorker, *, seconds: float) -> tuple[Rates, np.ndarray]:
    """Measures the rates of a worker on the first views.

    Args:
      seconds: duration, start-up excluded; at least two batches are timed.

    Returns:
      The rates, and logits float32 [n, C] of the views.
    """
    size = worker.batch_size
    seconds_per_batch = worker.try_teacher()
    logits, start, timed = [], 0.0, 0
    for batch in worker.input_of(VIEWS_SPLIT).batches(np.arange(0, _MOST_BATCHES * size, size)):
        logits.append(worker.run_teacher(batch))
        now = time.perf_counter()
        if start == 0.0:
            start = now  # the first batch waits until the input pipeline has started
        else:
            timed += size
            if timed >= 2 * size and now - start >= seconds:
                break
    rate = timed / (now - start)
    # A teacher on the CPU shares it with rendering, and is faster alone.
    rates = Rates(teacher=max(size / seconds_per_batch, rate), precompute=rate, measured=True)
    return rates, np.concatenate(logits)


def store_bytes(records: int, codec: Codec, views_per_shard: int) -> int:
    """Estimated size in bytes of the shards of a split; see `estimated_bytes`."""
    whole, rest = divmod(records, views_per_shard)
    return whole * estimated_bytes(views_per_shard, codec) + estimated_bytes(rest, codec)


def codec_costs(workload: Workload, logits: np.ndarray | None) -> dict[str, dict[str, float]]:
    """Size of the store with each codec, and the codec's error on logits float32 [n, C]."""
    names = dict.fromkeys([*_CODECS, workload.codec])
    out: dict[str, dict[str, float]] = {}
    for name in names:
        kept = kept_logits(name)
        if name != workload.codec and kept is not None and kept >= workload.num_classes:
            continue
        codec = make_codec(name, workload.num_classes, temperature=workload.temperature)
        views = store_bytes(workload.views, codec, workload.views_per_shard)
        crops = store_bytes(workload.eval_views, codec, workload.views_per_shard)
        out[name] = {"bytes_a_view": views / workload.views, "bytes": views + crops}
        if logits is not None:
            kl, error = fidelity(logits, codec.decode(codec.encode(logits)), workload.temperature)
            out[name] |= {"mean_kl": kl / len(logits), "max_logit_error": error}
    return out


def make_plan(
    workload: Workload, rates: Rates, *, students: int, workers: int, logits: np.ndarray | None = None
) -> dict[str, Any]:
    """The plan as a tree for JSON.

    Args:
      rates: rates of one worker.
      students: number of students that will be trained on the store.
      logits: logits float32 [n, C] on which the codecs are compared.

    Raises:
      UserError: there would be more shards than a store can have.
    """
    shards = len(
        cut_shards(VIEWS_SPLIT, published=[], total=workload.views, views_per_shard=workload.views_per_shard)
    )
    all_views = workload.views + workload.eval_views
    saved_seconds = workload.views / rates.teacher
    break_even = break_even_students(all_views / rates.precompute, saved_seconds=saved_seconds) or 1.0
    return {
        "dataset": workload.dataset,
        "num_examples": workload.num_examples,
        "num_classes": workload.num_classes,
        "epochs": workload.epochs,
        "views": workload.views,
        "eval_views": workload.eval_views,
        "codecs": codec_costs(workload, logits),
        "codec": workload.codec,
        "temperature": workload.temperature,
        "shards": {
            "views_per_shard": workload.views_per_shard,
            "count": shards,
            "most": MAX_SHARDS,
            "seconds_each": min(workload.views_per_shard, workload.views) / rates.precompute,
            "views_per_shard_in_ten_minutes": max(int(SHARD_SECONDS * rates.precompute), 1),
        },
        "rates": dataclasses.asdict(rates),
        "workers": workers,
        "teacher_hours": all_views / rates.teacher / 3600,
        "precompute_hours": all_views / rates.precompute / 3600,
        "wall_hours": all_views / rates.precompute / min(workers, shards) / 3600,
        "break_even_students": max(math.ceil(break_even - 1e-9), 1),
        "students": students,
        "online_teacher_hours": students * workload.views / rates.teacher / 3600,
        "saved_teacher_hours": students * workload.views / rates.teacher / 3600
        - all_views / rates.precompute / 3600,
    }


def _hours(hours: float) -> str:
    if hours < 1 / 60:
        return f"{3600 * hours:,.1f} s"
    return f"{hours:,.1f} h" if hours >= 1 else f"{60 * hours:,.1f} min"


def _codec_lines(plan: dict[str, Any]) -> list[str]:
    """Table of the codecs."""
    lines = [f"{'codec':10} {'bytes/view':>12} {'store':>10} {'mean KL':>9} {'worst logit':>12}"]
    for name, cost in plan["codecs"].items():
        kl = kl_text(cost["mean_kl"]) if "mean_kl" in cost else "-"
        # The error of `topk` is that of the logits that it drops on purpose.
        shown = "mean_kl" in cost and kept_logits(name) is None
        error = error_text(cost["max_logit_error"]) if shown else "-"
        chosen = "  <- --codec" if name == plan["codec"] else ""
        lines.append(
            f"{name:10} {cost['bytes_a_view']:>12,.0f} {bytes_text(cost['bytes']):>10} {kl:>9} {error:>12}{chosen}"
        )
    lines.append(
        f"KL(teacher || decoded) at T = {plan['temperature']:g}; sizes are without compression of the logits, which saves "
        "up to a quarter"
    )
    return lines


def plan_text(plan: dict[str, Any]) -> str:
    """The plan as a table for the terminal."""
    rates, shards = plan["rates"], plan["shards"]
    lines = [
        f"{plan['dataset']}: {plan['num_examples']:,} examples, {plan['num_classes']:,} classes",
        (
            f"{counted(plan['epochs'], 'epoch')}: {counted(plan['views'], 'view')}, and "
            f"{counted(plan['eval_views'], 'evaluation crop')}"
        ),
        "",
        *_codec_lines(plan),
        "",
    ]
    how = "measured here" if rates["measured"] else "as given"
    workers = f"{plan['workers']:,} workers" if plan["workers"] > 1 else "one worker"
    lines += [
        f"rates per worker, {how}: teacher alone {rates['teacher']:,.1f} views/s, precompute {rates['precompute']:,.1f}",
        (
            f"shards: {shards['count']:,} of {min(shards['views_per_shard'], plan['views']):,} views, "
            f"{_hours(shards['seconds_each'] / 3600)} each"
        ),
    ]
    if shards["count"] < (wanted := max(plan["workers"], 2)):
        fitting = -(-plan["views"] // wanted)
        lines.append(
            f"  each shard is computed by one worker, so only {shards['count']:,} can work at the same time; "
            f"--views_per_shard={fitting} makes {wanted:,} shards"
        )
    if shards["seconds_each"] > SHARD_SECONDS:
        lines.append(
            f"  a worker that dies loses its shard; --views_per_shard={shards['views_per_shard_in_ten_minutes']} makes it ten "
            "minutes"
        )
    lines += [
        f"teacher alone: {_hours(plan['teacher_hours'])} with one worker",
        f"precompute: {_hours(plan['precompute_hours'])} with one worker"
        + (f", {_hours(plan['wall_hours'])} with {workers}" if plan["workers"] > 1 else ""),
        f"online distillation: {_hours(plan['online_teacher_hours'])} of teacher time for {plan['students']:,} students",
        f"the store pays for itself with student {plan['break_even_students']:,}"
        + (
            f", and saves {_hours(plan['saved_teacher_hours'])} with {plan['students']:,} students"
            if plan["saved_teacher_hours"] > 0
            else ""
        ),
    ]
    return "\n".join(lines)


def given_workload(flags: argparse.Namespace) -> Workload:
    """The workload from flags alone, and from the data set's metadata if a data set is named.

    Raises:
      UserError: a flag is out of range, or there is no such data set.
    """
    # The numbers of an unnamed data set are not the embedded default, which has its own recipe.
    recipe = view_recipe_of(argparse.Namespace(**(vars(flags) | {"dataset": flags.dataset or "as given"})))
    if flags.dataset is None:
        name, examples, classes, eval_views = "data set as given", flags.num_examples, flags.num_classes, 0
    else:
        dataset = Dataset(
            flags.dataset,
            flags.split,
            data_dir=flags.data_dir,
            data_cache_bytes=flags.data_cache_bytes,
            image_feature=flags.image_feature,
            label_feature=flags.label_feature,
        )
        name, examples, classes = dataset.name, dataset.num_examples, flags.num_classes or dataset.num_classes
        if not classes:
            raise UserError(f"--dataset={flags.dataset}: has no labels; pass the teacher's --num_classes")
        eval_views = _eval_views(find_eval_splits(flags.eval_splits, dataset))
    check_num_classes(classes, of=name)
    return Workload(
        dataset=name,
        num_examples=examples,
        num_classes=classes,
        epochs=flags.epochs,
        eval_views=eval_views,
        views_per_shard=flags.views_per_shard,
        codec=flags.codec,
        temperature=recipe.temperature if flags.temperature is None else flags.temperature,
    )


def workload_of(options: PrecomputeOptions) -> Workload:
    """The workload of a precompute."""
    dataset = options.datasets[VIEWS_SPLIT]
    return Workload(
        dataset=dataset.name,
        num_examples=dataset.num_examples,
        num_classes=options.spec.num_classes,
        epochs=options.epochs,
        eval_views=_eval_views(options.datasets),
        views_per_shard=options.views_per_shard,
        codec=options.spec.codec,
        temperature=options.spec.temperature,
    )


def _eval_views(datasets: Mapping[str, Dataset]) -> int:
    return sum(dataset.num_examples for split, dataset in datasets.items() if split != VIEWS_SPLIT)


def measure_rates(options: PrecomputeOptions, *, seconds: float) -> tuple[Rates, np.ndarray]:
    """Runs `calibrate` on a worker of the precompute. Nothing is written."""
    job = PrecomputeJob(
        store=options.store,
        spec=options.spec.to_json(),
        data_dir=options.data_dir,
        teacher=options.teacher,
        image_cache_bytes=options.image_cache_bytes,
        input_buffer_bytes=options.input_buffer_bytes,
        data_cache_bytes=options.data_cache_bytes,
    )
    return calibrate(ShardWorker(job, options.datasets, teacher=options.loaded), seconds=seconds)
