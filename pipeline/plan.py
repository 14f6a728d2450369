r"""What a precompute would take, before it is begun: `python -m pipeline.plan`.

    python -m pipeline.plan --epochs=100                                       # embedded default, half a minute
    python -m pipeline.plan --dataset=oxford_flowers102 --data_dir=DIR --teacher=SAVED_MODEL --epochs=1000
    python -m pipeline.plan --num_examples=1281167 --num_classes=1000 --epochs=300 --teacher_rate=900 --workers=8

Takes the precompute's flags. Rates are measured here in some seconds, on the views that the precompute would begin
with; or they are given, of another machine, and then neither data set nor teacher needs to be there. A worker is what
does the given or measured rate: a process, or a machine with its accelerator.

Against online distillation: a student trained online runs the teacher on each of its views, and one trained on the
store does not. Everything else costs both the same, so precomputing has paid for itself after
`teacher rate / precompute rate` students, 1 where the precompute does nothing but wait for the teacher.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take seconds
    from pipeline.cli.main import run_module

    run_module("pipeline.plan", flags="pipeline.flags.plan")

import argparse
import dataclasses
import math
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from pipeline.cli.choices import check_num_classes
from pipeline.cli.units import counted
from pipeline.flags.plan import CALIBRATE_SECONDS, parse
from pipeline.flags.precompute import announce_demo, view_recipe_of
from pipeline.inputs.dataset import Dataset
from pipeline.pages.figures import bytes_text, error_text, kept_logits, kl_text
from pipeline.precomputing.break_even import break_even_students
from pipeline.precomputing.options import find_eval_splits, resolve
from pipeline.precomputing.shard_tasks import SHARD_SECONDS, cut_shards
from pipeline.precomputing.worker import PrecomputeJob, ShardWorker, Totals
from pipeline.storage.files import write_json
from pipeline.store.codecs import Codec, fidelity, make_codec
from pipeline.store.layout import VIEWS_SPLIT
from pipeline.store.shards import MAX_SHARDS, ShardTask, estimated_bytes

_CODECS = ("float32", "bfloat16", "float16", "int8", "topk:10", "topk:100")
_LONGEST = 4096  # batches, where the teacher is so fast that this takes less


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
    """What one worker does.

    Attributes:
      teacher: views a second, of the teacher alone.
      precompute: views a second, with reading, rendering and encoding beside it.
      measured: here, and not given.
    """

    teacher: float
    precompute: float
    measured: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What is to be computed.

    Attributes:
      dataset: name, or how it was described.
      num_examples: N.
      num_classes: C.
      epochs: that the store shall hold.
      eval_views: of the evaluated splits.
      views_per_shard: at most.
      codec: that is asked for.
      temperature: of the store.
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
        """Training views."""
        return self.epochs * self.num_examples


def calibrate(worker: ShardWorker, *, seconds: float = CALIBRATE_SECONDS) -> tuple[Rates, np.ndarray]:
    """Runs the first views as the precompute would.

    Args:
      worker: of the precompute.
      seconds: to measure for; at least two batches.

    Returns:
      The rates, and the logits float32 [n, C] of the views.
    """
    size = worker.spec.teacher.batch_size
    seconds_a_batch = worker.warm_up()
    task = ShardTask(split=VIEWS_SPLIT, number=0, first=0, records=_LONGEST * size)
    found, begun, timed = [], 0.0, 0
    for _, batch in worker.batches(task, Totals()):
        found.append(worker.run_teacher(batch))
        now = time.perf_counter()
        if begun == 0.0:
            begun = now  # the first one waited for the threads to start
        else:
            timed += size
            if timed >= 2 * size and now - begun >= seconds:
                break
    rate = timed / (now - begun)
    # Rendering shares the processor with a teacher that runs on it: alone it is faster.
    rates = Rates(teacher=max(size / seconds_a_batch, rate), precompute=rate, measured=True)
    return rates, np.concatenate(found)


def store_bytes(records: int, codec: Codec, views_per_shard: int) -> int:
    """Size of the files of so many records, about; see `estimated_bytes`."""
    whole, rest = divmod(records, views_per_shard)
    return whole * estimated_bytes(views_per_shard, codec) + estimated_bytes(rest, codec)


def codec_costs(task: Task, logits: np.ndarray | None) -> dict[str, dict[str, float]]:
    """Bytes of each codec, and with logits float32 [n, C] at hand what it costs in accuracy."""
    names = dict.fromkeys([*_CODECS, task.codec])
    out: dict[str, dict[str, float]] = {}
    for name in names:
        if name != task.codec and name.startswith("topk:") and int(name[5:]) >= task.num_classes:
            continue
        codec = make_codec(name, task.num_classes, temperature=task.temperature)
        views = store_bytes(task.views, codec, task.views_per_shard)
        crops = store_bytes(task.eval_views, codec, task.views_per_shard)
        out[name] = {"bytes_a_view": views / task.views, "bytes": views + crops}
        if logits is not None:
            kl, error = fidelity(logits, codec.decode(codec.encode(logits)), task.temperature)
            out[name] |= {"mean_kl": kl / len(logits), "max_logit_error": error}
    return out


def make_plan(
    task: Task, rates: Rates, *, students: int, workers: int, logits: np.ndarray | None = None
) -> dict[str, Any]:
    """The plan as JSON has it; see the module's docstring for what is reckoned.

    Raises:
      UserError: more shards than a store can have.
    """
    shards = len(
        cut_shards(VIEWS_SPLIT, published=[], total=task.views, views_per_shard=task.views_per_shard)
    )
    all_views = task.views + task.eval_views
    saved_seconds = task.views / rates.teacher
    break_even = break_even_students(all_views / rates.precompute, saved_seconds=saved_seconds) or 1.0
    return {
        "dataset": task.dataset,
        "num_examples": task.num_examples,
        "num_classes": task.num_classes,
        "epochs": task.epochs,
        "views": task.views,
        "eval_views": task.eval_views,
        "codecs": codec_costs(task, logits),
        "codec": task.codec,
        "temperature": task.temperature,
        "shards": {
            "views_per_shard": task.views_per_shard,
            "count": shards,
            "most": MAX_SHARDS,
            "seconds_each": min(task.views_per_shard, task.views) / rates.precompute,
            "views_per_shard_in_ten_minutes": max(int(SHARD_SECONDS * rates.precompute), 1),
        },
        "rates": dataclasses.asdict(rates),
        "workers": workers,
        "teacher_hours": all_views / rates.teacher / 3600,
        "precompute_hours": all_views / rates.precompute / 3600,
        "wall_hours": all_views / rates.precompute / min(workers, shards) / 3600,
        "break_even_students": max(math.ceil(break_even - 1e-9), 1),
        "students": students,
        "online_teacher_hours": students * task.views / rates.teacher / 3600,
        "saved_teacher_hours": students * task.views / rates.teacher / 3600
        - all_views / rates.precompute / 3600,
    }


def _hours(hours: float) -> str:
    if hours < 1 / 60:
        return f"{3600 * hours:,.1f} s"
    return f"{hours:,.1f} h" if hours >= 1 else f"{60 * hours:,.1f} min"


def table(plan: dict[str, Any]) -> str:
    """The plan for people."""
    rates, shards = plan["rates"], plan["shards"]
    lines = [
        f"{plan['dataset']}: {plan['num_examples']:,} examples, {plan['num_classes']:,} classes",
        (
            f"{counted(plan['epochs'], 'epoch')}: {counted(plan['views'], 'view')}, and "
            f"{counted(plan['eval_views'], 'evaluation crop')}"
        ),
        "",
        f"{'codec':10} {'bytes a view':>12} {'store':>10} {'mean KL':>9} {'worst logit':>12}",
    ]
    for name, cost in plan["codecs"].items():
        kl = kl_text(cost["mean_kl"]) if "mean_kl" in cost else "-"
        # Of `topk`, the error is that of logits which it does not keep.
        shown = "mean_kl" in cost and kept_logits(name) is None
        error = error_text(cost["max_logit_error"]) if shown else "-"
        chosen = "  <- --codec" if name == plan["codec"] else ""
        lines.append(
            f"{name:10} {cost['bytes_a_view']:>12,.0f} {bytes_text(cost['bytes']):>10} {kl:>9} {error:>12}{chosen}"
        )
    how = "measured here" if rates["measured"] else "as given"
    workers = f"{plan['workers']:,} workers" if plan["workers"] > 1 else "one worker"
    lines += [
        (
            f"KL(teacher || decoded) at T = {plan['temperature']:g}; sizes before compression of the logits, which saves "
            "up to a quarter"
        ),
        "",
        f"rates of a worker, {how}: teacher alone {rates['teacher']:,.1f} views/s, precompute {rates['precompute']:,.1f}",
        (
            f"shards: {shards['count']:,} of {min(shards['views_per_shard'], plan['views']):,} views, "
            f"{_hours(shards['seconds_each'] / 3600)} each"
        ),
    ]
    if shards["count"] < (wanted := max(plan["workers"], 2)):
        fitting = -(-plan["views"] // wanted)
        lines.append(
            f"  a shard is the work of one worker, so that only {shards['count']:,} can work at once: --views_per_shard={fitting} "
            f"makes a shard for each of {wanted:,}"
        )
    if shards["seconds_each"] > SHARD_SECONDS:
        lines.append(
            f"  a lost worker costs as much: --views_per_shard={shards['views_per_shard_in_ten_minutes']} takes ten minutes"
        )
    lines += [
        f"teacher: {_hours(plan['teacher_hours'])} of a worker",
        f"precompute: {_hours(plan['precompute_hours'])} of a worker, {_hours(plan['wall_hours'])} with {workers}",
        f"online distillation would run the teacher {_hours(plan['online_teacher_hours'])} for {plan['students']:,} students",
        f"the store has paid for itself with student {plan['break_even_students']:,}; with {plan['students']:,} it saves "
        f"{_hours(plan['saved_teacher_hours'])}"
        if plan["saved_teacher_hours"] > 0
        else f"the store pays for itself with student {plan['break_even_students']:,}",
    ]
    return "\n".join(lines)


def _given_task(flags: argparse.Namespace) -> Task:
    """The task without a look at the teacher, and at a data set only if one is named."""
    # A data set of numbers alone is not the embedded default, which has a recipe of its own.
    recipe = view_recipe_of(argparse.Namespace(**(vars(flags) | {"dataset": flags.dataset or "as given"})))
    if flags.dataset is None:
        name, examples, classes, eval_views = "data set as given", flags.num_examples, flags.num_classes, 0
    else:
        dataset = Dataset(
            flags.dataset, flags.split, data_dir=flags.data_dir, data_cache_bytes=flags.data_cache_bytes
        )
        name, examples, classes = dataset.name, dataset.num_examples, dataset.num_classes
        eval_views = _eval_views(find_eval_splits(flags.eval_splits, dataset))
    check_num_classes(classes, of=name)
    return Task(
        dataset=name,
        num_examples=examples,
        num_classes=classes,
        epochs=flags.epochs,
        eval_views=eval_views,
        views_per_shard=flags.views_per_shard,
        codec=flags.codec,
        temperature=recipe.temperature if flags.temperature is None else flags.temperature,
    )


def _eval_views(datasets: Mapping[str, Dataset]) -> int:
    return sum(dataset.num_examples for split, dataset in datasets.items() if split != VIEWS_SPLIT)


def _measured(flags: argparse.Namespace) -> tuple[Task, Rates, np.ndarray]:
    """The task, and what a calibration finds: rates and logits."""
    with tempfile.TemporaryDirectory() as scratch:
        flags.store = scratch
        options = resolve(flags, is_demo=announce_demo(flags))
        spec = options.spec
        dataset = options.datasets[VIEWS_SPLIT]
        job = PrecomputeJob(
            store=scratch,
            spec=spec.to_json(),
            data_dir=options.data_dir,
            teacher=options.teacher,
            image_cache_bytes=options.image_cache_bytes,
            input_buffer_bytes=options.input_buffer_bytes,
            data_cache_bytes=options.data_cache_bytes,
        )
        print(f"measuring for {flags.calibrate_seconds:g} s ...", file=sys.stderr, flush=True)
        rates, logits = calibrate(
            ShardWorker(job, options.datasets, teacher=options.loaded), seconds=flags.calibrate_seconds
        )
        task = Task(
            dataset=dataset.name,
            num_examples=dataset.num_examples,
            num_classes=dataset.num_classes,
            epochs=options.epochs,
            eval_views=_eval_views(options.datasets),
            views_per_shard=options.views_per_shard,
            codec=spec.codec,
            temperature=spec.temperature,
        )
    return task, rates, logits


def main(argv: list[str]) -> int:
    """The command; see the module's docstring."""
    flags = parse(argv)
    given = flags.teacher_rate is not None
    logits = None
    if given:
        precompute_rate = flags.precompute_rate or flags.teacher_rate
        task = _given_task(flags)
        rates = Rates(teacher=flags.teacher_rate, precompute=precompute_rate, measured=False)
    else:
        task, rates, logits = _measured(flags)
    plan = make_plan(task, rates, students=flags.students, workers=flags.workers, logits=logits)
    print(table(plan))
    if flags.json is not None:
        write_json(flags.json, plan)
    return 0
