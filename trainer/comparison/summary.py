"""Finished runs to the result.json of a comparison: pairs of runs, arms over seeds, and what it cost."""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.cli import environment
from pipeline.cli.units import counted
from pipeline.errors import DataError, UserError
from pipeline.store.reader import Store
from pipeline.store.spec import differences
from trainer.comparison.finished import FinishedRun
from trainer.comparison.pair_figures import cost_figures, loss_figures, prediction_figures, weight_figures
from trainer.comparison.result_file import FORMAT, summarise
from trainer.targets.arms import ARMS

# Of a recipe, what is said of each run: its length, and the views, which are the store's.
_OF_RUNS = ("epochs", "views", "warmup_steps")
PAIRS = (("offline", "online"), ("consistent", "fixed"), ("consistent", "independent"))


def summarize(
    store: Store, runs: Sequence[FinishedRun], *, workdir: Path, command: str, measured: dict[str, Any] | None
) -> dict[str, Any]:
    """The result of a comparison, as JSON.

    Args:
      store: that all runs were trained on.
      runs: at least one.
      workdir: of the comparison; directories of runs below it are told relative to it.
      command: that asked for it.
      measured: what `trainer.comparison.measure` wrote, or None.

    Raises:
      UserError: two runs are not to be compared: of other students, data or numbers.
    """
    check_comparable(store, runs)
    runs = sorted(runs, key=lambda run: (list(ARMS).index(run.arm), run.epochs, run.seed))
    first, final = runs[0], runs[0].evaluation
    spec = store.spec
    rows = [run.to_json(relative_to=workdir) for run in runs]
    return {
        "format": FORMAT,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "versions": environment.versions(),
        "processor": environment.processor(),
        "store": {
            "path": store.location,
            "digest": spec.digest(),
            "views": store.views.num_records,
            "examples": spec.num_examples,
            "epochs": store.epochs,
            "bytes": store.views.manifest.bytes,
            "codec": spec.codec,
            "temperature": spec.temperature,
            "spec": {"identity": spec.identity(), "provenance": spec.provenance},
            "precompute_teacher_passes": _teacher_passes(store),
        },
        "recipe": _recipe(runs),
        "student": {
            "name": first.result["student"],
            "parameters": first.result["parameters"],
        },
        "teacher": {
            "path": spec.provenance.get("teacher"),
            "parameters": None if measured is None else measured["teacher_parameters"],
            "top1": final["teacher_top1"],
        },
        "eval_split": first.result["eval_split"],
        "eval_images": final["examples"],
        "eval_unlabeled": final.get("unlabeled", 0),
        "classes": spec.num_classes,
        "runs": rows,
        "pairs": [compare_runs(a, b) for a, b in _pairs(runs)],
        "arms": summarise(rows),
        "cost": _cost(store, runs, measured),
    }


def check_comparable(store: Store, runs: Sequence[FinishedRun]) -> None:
    """Whether runs differ in nothing but arm, seed and length.

    Raises:
      UserError: they do; both sides are shown.
    """
    keys = [(run.arm, run.seed, run.epochs) for run in runs]
    for run, key in zip(runs, keys, strict=True):
        if keys.count(key) > 1:
            twice = [str(other.directory) for other, found in zip(runs, keys, strict=True) if found == key]
            raise UserError(
                f"{' and '.join(twice)}: both are {key[0]} with seed {key[1]} and {counted(key[2], 'epoch')}; name one of them"
            )
        here, there = _identity(run), _identity(runs[0])
        sides = (f"in {run.directory}", f"in {runs[0].directory}")
        if lines := differences(here, there, sides=sides):
            raise UserError(f"runs that are not to be compared: {'; '.join(lines)}; leave one of them out")
        if here["spec"] != store.spec.digest():
            raise UserError(
                f"{run.directory}: trained on the store {here['spec'][:16]}, {store.location} is {store.spec.digest()[:16]}; "
                "pass the --store that it was trained on"
            )


def _identity(run: FinishedRun) -> dict[str, Any]:
    """What has to be the same in every run."""
    recipe = {k: v for k, v in run.config["recipe"].items() if k not in ("source", "epochs")}
    return {
        "spec": run.result["spec"],
        "eval_split": run.result["eval_split"],
        "recipe_name": run.config["recipe_name"],
        **recipe,
        "temperature": run.config["temperature"],
        "precision": run.config["flags"]["precision"],
    }


def _teacher_passes(store: Store) -> int:
    """Images that the precompute ran the teacher on: views and evaluation crops."""
    return store.views.num_records + sum(store.eval_reader(name).num_records for name in store.eval_splits)


def _pairs(runs: Sequence[FinishedRun]) -> list[tuple[FinishedRun, FinishedRun]]:
    """Runs of the same seed and length whose arms are to be compared."""
    by_key = {(run.arm, run.seed, run.epochs): run for run in runs}
    return [
        (run, by_key[b, run.seed, run.epochs])
        for a, b in PAIRS
        for run in runs
        if run.arm == a and (b, run.seed, run.epochs) in by_key
    ]


def compare_runs(a: FinishedRun, b: FinishedRun) -> dict[str, Any]:
    """How far two runs of the same seed and length are apart."""
    ours, labels = a.predictions()
    theirs, _ = b.predictions()
    try:
        weights = weight_figures(a.weights(), b.weights())
        if ours.shape != theirs.shape:
            raise ValueError(f"{len(ours)} and {len(theirs)} predictions")
    except ValueError as error:
        raise DataError(f"{a.directory} and {b.directory}: {error}; leave one of them out") from error
    return {
        "a": a.arm,
        "b": b.arm,
        "seed": a.seed,
        "epochs": a.epochs,
        **loss_figures(a.curve("loss"), b.curve("loss")),
        **weights,
        **prediction_figures(ours, theirs, labels),
    }


def _cost(store: Store, runs: Sequence[FinishedRun], measured: dict[str, Any] | None) -> dict[str, Any]:
    """What can be counted; with measured seconds, what follows from them for the longest online run there is."""
    longest = max(runs, key=lambda run: (run.arm == "online", run.steps))
    size, passes = longest.batch_size, _teacher_passes(store)
    teacher_batch = store.spec.teacher.batch_size
    rows = (
        -(-size // teacher_batch) * teacher_batch
    )  # as `trainer.targets.online_teacher.BatchedTeacher` pads
    counted = {
        "batch_size": size,
        "teacher_batch_size": teacher_batch,
        "teacher_rows_a_step": rows,
        "seconds_a_step_in_runs": _seconds_in_runs(runs),
        "teacher_passes": {"offline": 0, "online": longest.steps * size},
        "store_bytes": store.views.manifest.bytes,
        "bytes_a_view": store.views.manifest.bytes / store.views.num_records,
    }
    if measured is None:
        return {
            **counted,
            "seconds_a_step": None,
            "how": "no step was measured (--no-measure, or no online arm)",
        }
    figures = cost_figures(
        measured["seconds_a_step"],
        batch_size=size,
        teacher_rows=rows,
        steps=longest.steps,
        precompute_passes=passes,
    )
    return {
        **counted,
        "seconds_a_step": measured["seconds_a_step"],
        "seconds_a_step_spread": measured.get("seconds_a_step_spread"),  # older measurements have none
        **figures,
        "how": f"{measured['how']}; the store is paid for by students of {longest.steps:,} steps each, its own cost taken "
        f"as the teacher's and the input's seconds for {passes:,} images",
    }


def _seconds_in_runs(runs: Sequence[FinishedRun]) -> dict[str, float]:
    """Mean seconds per step of the runs themselves, by arm."""
    found: dict[str, list[float]] = {}
    for run in runs:
        if (seconds := run.seconds_a_step) is not None:
            found.setdefault(run.arm, []).append(seconds)
    return {arm: statistics.fmean(values) for arm, values in found.items()}


def _recipe(runs: Sequence[FinishedRun]) -> dict[str, Any]:
    """The recipe as all runs had it. What depends on a run's length is given by length where lengths differ."""
    first = runs[0]
    warmup = {run.epochs: run.warmup_steps for run in runs}
    same = len({*warmup.values()}) == 1
    return {
        "name": first.config["recipe_name"],
        **{name: value for name, value in first.config["recipe"].items() if name not in _OF_RUNS},
        "temperature": first.config["temperature"],
        "warmup_steps": first.warmup_steps
        if same
        else {counted(epochs, "epoch"): steps for epochs, steps in sorted(warmup.items())},
    }
