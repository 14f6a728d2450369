"""Builds the result.json of a comparison from finished runs, and merges the results of several comparisons."""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.cli import environment
from pipeline.cli.units import counted
from pipeline.errors import DataError, UserError
from pipeline.store.spec import differences
from pipeline.store.view_store import ViewStore
from trainer.comparison.finished import FinishedRun
from trainer.comparison.pair_figures import cost_figures, loss_figures, prediction_figures, weight_figures
from trainer.comparison.result_file import FORMAT, Result, Row
from trainer.targets.arms import ARMS

PAIRS = (("offline", "online"), ("consistent", "fixed"), ("consistent", "independent"))
# Entries of a recipe that belong to a single run (its length) or to the store (its views).
_OF_RUNS = ("epochs", "views", "warmup_steps")
# Entries of a result's recipe that may differ: they depend on the length, or are written by older versions only.
_OF_LENGTHS = ("warmup_steps", "epochs", "views", "source")


def make_result(
    store: ViewStore,
    runs: Sequence[FinishedRun],
    *,
    workdir: Path,
    command: str,
    measured: dict[str, Any] | None,
) -> Result:
    """Builds the result of a comparison as a JSON tree.

    Args:
      workdir: Directory of the comparison; the directories of runs below it are relative to it.
      measured: Tree of cost.json, or None.
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
            "digest": store.identity()["spec"],
            "views": store.views.num_records,
            "examples": spec.num_examples,
            "epochs": store.epochs,
            "bytes": store.view_bytes,
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
            "path": " and ".join(str(part.spec.provenance.get("teacher")) for part in store.stores),
            "parameters": None if measured is None else measured["teacher_parameters"],
            "top1": final["teacher_top1"],
        },
        **({"teachers": _teachers(store, final["teachers"])} if "teachers" in final else {}),
        "eval_split": first.result["eval_split"],
        "eval_images": final["examples"],
        "eval_unlabeled": final.get("unlabeled", 0),
        "no_accuracy": first.result.get("no_accuracy"),
        "classes": spec.num_classes,
        "runs": rows,
        "pairs": [compare_runs(a, b) for a, b in _pairs(runs)],
        "arms": arm_rows(rows),
        "cost": _cost(store, runs, measured),
    }


def _teachers(store: ViewStore, figures: Sequence[Row]) -> list[Row]:
    """`teachers` of a result, for several stores."""
    return [
        {
            "path": part.spec.provenance.get("teacher"),
            "store": part.location,
            "digest": part.spec.digest(),
            "weight": weight,
            "image_size": part.image_size,
            "top1": figure["top1"],
        }
        for part, weight, figure in zip(store.stores, store.weights, figures, strict=True)
    ]


def check_comparable(store: ViewStore, runs: Sequence[FinishedRun]) -> None:
    """Checks that runs differ only in arm, seed and length."""
    keys = [(run.arm, run.seed, run.epochs) for run in runs]
    for run, key in zip(runs, keys, strict=True):
        if keys.count(key) > 1:
            twice = [str(other.directory) for other, found in zip(runs, keys, strict=True) if found == key]
            raise UserError(
                f"{' and '.join(twice)}: both are {key[0]} with seed {key[1]} and {counted(key[2], 'epoch')}; name one of them"
            )
        here, there = _run_identity(run), _run_identity(runs[0])
        sides = (f"in {run.directory}", f"in {runs[0].directory}")
        if lines := differences(here, there, sides=sides):
            raise UserError(f"runs cannot be compared: {'; '.join(lines)}; leave one of them out")
        digest = store.identity()["spec"]
        if here["spec"] != digest:
            raise UserError(
                f"{run.directory}: trained on the store {here['spec'][:16]}, {store.location} is {digest[:16]}; "
                "pass the --store that it was trained on"
            )
    _check_lengths([(str(run.directory), run.epochs, run.steps) for run in runs])


def _run_identity(run: FinishedRun) -> dict[str, Any]:
    """The settings that all runs of a comparison share."""
    recipe = {k: v for k, v in run.config["recipe"].items() if k not in ("source", "epochs")}
    return {
        "spec": run.result["spec"],
        **_image_size(run),
        "eval_split": run.result["eval_split"],
        "recipe_name": run.config["recipe_name"],
        **recipe,
        "temperature": run.config["temperature"],
        "precision": run.config["flags"]["precision"],
        "sync_batch_norm": dict(run.config["flags"]).get("sync_batch_norm") or False,
    }


def _image_size(run: FinishedRun) -> dict[str, Any]:
    """`image_size` of a run that differs from the store's."""
    found = dict(run.result).get("image_size")
    return {} if found is None else {"image_size": found}


def _check_lengths(runs: Sequence[tuple[str, float, float | None]]) -> None:
    """Checks that runs with equal epochs have equal steps, since pairs and means are made of them.

    Args:
      runs: Directory, epochs and steps of each run; steps are None where an older result lacks them.
    """
    known: dict[float, tuple[str, float]] = {}
    for directory, epochs, steps in runs:
        if steps is None:
            continue
        other, expected = known.setdefault(epochs, (directory, steps))
        if steps != expected:
            raise UserError(
                f"{directory} has {steps} steps and {other} has {expected} steps, both about {counted(epochs, 'epoch')}; "
                "runs of unequal steps cannot be compared: leave one of them out"
            )


def _teacher_passes(store: ViewStore) -> int:
    """Images that the teachers processed for the stores: views and evaluation crops."""
    return sum(
        part.views.num_records + sum(part.eval_reader(name).num_records for name in part.eval_splits)
        for part in store.stores
    )


def _pairs(runs: Sequence[FinishedRun]) -> list[tuple[FinishedRun, FinishedRun]]:
    """Pairs of runs with the same seed and length, of the arms in `PAIRS`."""
    by_key = {(run.arm, run.seed, run.epochs): run for run in runs}
    return [
        (run, by_key[b, run.seed, run.epochs])
        for a, b in PAIRS
        for run in runs
        if run.arm == a and (b, run.seed, run.epochs) in by_key
    ]


def compare_runs(a: FinishedRun, b: FinishedRun) -> Row:
    """The row in `pairs` of two runs with the same seed and length.

    Raises:
      DataError: students or predictions have different shapes.
    """
    ours, labels = a.predictions()
    theirs, other_labels = b.predictions()
    try:
        weights = weight_figures(a.weights(), b.weights())
        if ours.shape != theirs.shape:
            raise ValueError(f"{len(ours)} and {len(theirs)} predictions")
        if (labels != other_labels).any():
            raise ValueError("predictions with different labels")
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


def arm_rows(runs: Sequence[Row]) -> list[Row]:
    """`arms` of a result: mean over seeds by arm and length; standard deviation from two seeds on."""
    groups: dict[tuple[str, float], list[Row]] = {}
    for run in runs:
        groups.setdefault((run["arm"], run["epochs"]), []).append(run)
    rows = []
    for (arm, epochs), members in groups.items():
        row: Row = {"arm": arm, "epochs": epochs, "seeds": [run["seed"] for run in members]}
        for name in ("top1", "agreement"):
            values = _values(members, name)
            row[f"{name}_mean"] = statistics.fmean(values) if values else None
            row[f"{name}_std"] = statistics.stdev(values) if len(values) > 1 else None
        losses = _values(members, "distillation_loss")
        row["loss_mean"] = statistics.fmean(losses) if losses else None
        rows.append(row)
    return rows


def _values(rows: Sequence[Row], name: str) -> list[float]:
    return [float(row[name]) for row in rows if row.get(name) is not None]


def _cost(store: ViewStore, runs: Sequence[FinishedRun], measured: dict[str, Any] | None) -> Row:
    """`cost` of a result: counts, and with measured seconds the figures for the longest online run."""
    longest = max(runs, key=lambda run: (run.arm == "online", run.steps))
    size, passes = longest.batch_size, _teacher_passes(store)
    sizes = [part.spec.teacher.batch_size for part in store.stores]
    rows = sum(-(-size // batch) * batch for batch in sizes)  # `BatchedTeacher` pads
    counts = {
        "batch_size": size,
        "teacher_batch_size": sizes[0] if len(sizes) == 1 else None,
        "teacher_rows_a_step": rows,
        "seconds_a_step_in_runs": _seconds_in_runs(runs),
        "teacher_passes": {"offline": 0, "online": longest.steps * size * len(sizes)},
        "store_bytes": store.view_bytes,
        "bytes_a_view": store.view_bytes / store.views.num_records,
    }
    if measured is None:
        return {
            **counts,
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
        **counts,
        "seconds_a_step": measured["seconds_a_step"],
        "seconds_a_step_spread": measured.get("seconds_a_step_spread"),  # absent in older measurements
        **figures,
        "how": f"{measured['how']}; break-even for students of {longest.steps:,} steps each; the store's cost is estimated as "
        f"the teacher's and the input's seconds for {passes:,} images",
    }


def _seconds_in_runs(runs: Sequence[FinishedRun]) -> dict[str, float]:
    """Mean seconds per step of the training runs, by arm."""
    found: dict[str, list[float]] = {}
    for run in runs:
        if (seconds := run.seconds_a_step) is not None:
            found.setdefault(run.arm, []).append(seconds)
    return {arm: statistics.fmean(values) for arm, values in found.items()}


def _recipe(runs: Sequence[FinishedRun]) -> Row:
    """The common recipe. Warm-up steps are given by length where they differ."""
    first = runs[0]
    warmup = {run.epochs: run.warmup_steps for run in runs}
    same = len({*warmup.values()}) == 1
    return {
        "name": first.config["recipe_name"],
        **{name: value for name, value in first.config["recipe"].items() if name not in _OF_RUNS},
        "temperature": first.config["temperature"],
        **_image_size(first),
        "warmup_steps": first.warmup_steps
        if same
        else {counted(epochs, "epoch"): steps for epochs, steps in sorted(warmup.items())},
    }


def merge_results(results: Sequence[Result]) -> Result:
    """Merges results of several comparisons: all runs and pairs, and the first measured cost.

    Raises:
      UserError: they belong to different stores, students or evaluations, or contain a run twice with different figures.
    """
    first = results[0]
    for other in results[1:]:
        here, there = _result_identity(first), _result_identity(other)
        if lines := differences(here, there, sides=("in the first", "in another")):
            raise UserError(f"--from: results cannot be merged: {'; '.join(lines)}; report them separately")
    runs: dict[tuple[Any, ...], Row] = {}
    for run in (run for result in results for run in result["runs"]):
        if (known := runs.setdefault((run["arm"], run["epochs"], run["seed"]), run)) != run:
            raise UserError(
                f"--from: {run['arm']}, {counted(run['epochs'], 'epoch')}, seed {run['seed']} is in {known.get('directory')} and "
                f"in {run.get('directory')}, with different figures; name one of them"
            )
    _check_lengths([(str(run.get("directory")), run["epochs"], run.get("steps")) for run in runs.values()])
    pairs = {
        (pair["a"], pair["b"], pair["epochs"], pair["seed"]): pair
        for result in results
        for pair in result.get("pairs") or []
    }
    costs = [result["cost"] for result in results if (result.get("cost") or {}).get("seconds_a_step")]
    return {
        **first,
        "created": max(str(result.get("created")) for result in results),
        "command": "\n".join(dict.fromkeys(str(result.get("command")) for result in results)),
        "runs": list(runs.values()),
        "pairs": list(pairs.values()),
        "arms": arm_rows(list(runs.values())),
        "cost": costs[0] if costs else first.get("cost"),
    }


def _result_identity(result: Result) -> dict[str, Any]:
    """The entries that all merged results share."""
    names = ("student", "eval_split", "eval_images", "classes")
    recipe = {name: value for name, value in (result.get("recipe") or {}).items() if name not in _OF_LENGTHS}
    return {
        "store": {"digest": (result.get("store") or {}).get("digest")},
        "recipe": recipe,
        **{name: result.get(name) for name in names},
    }
