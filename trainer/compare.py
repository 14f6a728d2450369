"""Compares offline with online function matching, and with the settings that the paper rejects.

    python -m trainer.compare --store=runs/mnist_5k/store --workdir=runs/mnist_5k/compare          # two minutes
    python -m trainer.compare --workdir=DIR --from=DIR1,DIR2       # the same report from earlier runs, no training

Trains one student for each arm (`trainer.targets.arms`), seed and length, from the same initial weights under the same
schedule, in child processes. Then measures the time per step online and offline, and writes `result.json` and a report.
Each run is a run of `trainer.train` with its own directory below `runs/`. After an interruption the same command
continues the runs; finished runs are not repeated. A command with more arms, seeds or lengths adds them to the
comparison in its directory.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take seconds
    from pipeline.cli.main import run_module

    run_module("trainer.compare", flags="trainer.flags.compare")

import argparse
import json
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from tqdm import tqdm

from pipeline.cli.parser import make_directory
from pipeline.cli.units import counted
from pipeline.errors import DataError, UserError
from pipeline.inputs.labels import match_classes
from pipeline.inputs.locate import check_teacher_exists, find_data_dir, find_teacher, open_dataset
from pipeline.storage.checked_json import build, read_json
from pipeline.storage.files import remove_temporaries, write_json
from pipeline.storage.lock import LOCK_FILE, writer_lock
from pipeline.store.combination import open_stores
from pipeline.store.spec import differences
from pipeline.store.view_store import ViewStore
from trainer.comparison.finished import FinishedRun, is_finished
from trainer.comparison.result_file import RESULT_LIMIT, CostFile, load_result
from trainer.comparison.summary import make_result, merge_results
from trainer.comparison.table import comparison_table
from trainer.config.recipes import train_recipe
from trainer.config.run_files import (
    COMPARISON_FILE,
    CONFIG_FILE,
    FILE_LIMIT,
    METRICS_FILE,
    RESULT_FILE,
    RUNS_DIRECTORY,
    stores_of,
)
from trainer.flags.compare import parse
from trainer.flags.shared import shared_arguments, shared_flags
from trainer.flags.train import make_parser as make_train_parser
from trainer.pages.report import REPORT_FILE, write_report
from trainer.pages.view_grid import VIEWS_FILE, save_views
from trainer.run.child_runs import Job, run_jobs
from trainer.run.evaluation import accuracy_text, unlabeled_text
from trainer.run.options import default_recipe, resolve
from trainer.targets.arms import ARMS

EPOCHS = "epochs"  # key in comparison.json
COST_FILE = "cost.json"  # written by `trainer.comparison.measure`
# Flags that may differ between commands for one directory, because no figure depends on them.
_FREE = (
    "image_size",  # part of the store's identity where it differs from the store's
    "data_dir",
    "data_cache_bytes",
    "shard_cache_bytes",
    "image_cache_bytes",
    "input_buffer_bytes",
    "eval_batch_size",
    "checkpoint_every",
)


class _Comparison(TypedDict):
    """comparison.json: settings that all runs share, and the lengths of the first command."""

    epochs: NotRequired[list[int]]


def main(argv: list[str]) -> int:
    """The command; see the module's docstring."""
    flags = parse(argv)
    workdir = Path(flags.workdir)
    _check_workdir(workdir, earlier=flags.earlier)
    if flags.earlier is not None:
        return _compare_earlier(flags, workdir)
    store = open_stores(
        flags.store,
        weights=flags.store_weights,
        image_size=flags.image_size,
        shard_cache_bytes=flags.shard_cache_bytes,
    )
    store.check_files()
    planned = plan_runs(flags, store)
    dataset = open_dataset(store, "views", data_dir=flags.data_dir, data_cache_bytes=flags.data_cache_bytes)
    match = match_classes(dataset, store.spec.num_classes, store.classes)
    if match.note is not None:
        print(match.note, flush=True)
    _check_same(flags, store, workdir)
    make_directory(workdir, flag="--workdir")
    with writer_lock(workdir, flag="--workdir"):
        remove_temporaries(workdir)
        if not (workdir / COMPARISON_FILE).exists():
            shared = {**_shared_settings(flags, store), EPOCHS: _lengths(flags, store)}
            write_json(workdir / COMPARISON_FILE, shared)
        jobs = [job for job in planned if not _is_done(job)]
        print(f"{len(planned)} runs, {len(planned) - len(jobs)} of them finished", flush=True)
        run_jobs(jobs, parallel=flags.parallel, on_finished=_report_run)
        if (cost := _cost_job(flags, planned, workdir)) is not None:
            print("measuring the time per step, online and offline; --no-measure skips this", flush=True)
            shutil.rmtree(cost.workdir, ignore_errors=True)  # progress of an interrupted measurement
            cost.workdir.mkdir()
            run_jobs([cost], parallel=1, on_finished=lambda _: None, unit=" turns")
            shutil.rmtree(cost.workdir)
        result = _make_result(store, _finished_below(workdir), workdir, _read_cost(workdir))
        if not (workdir / VIEWS_FILE).exists():
            save_views(store, dataset, workdir / VIEWS_FILE)
        _finish(result, workdir)
    return 0


def _compare_earlier(flags: argparse.Namespace, workdir: Path) -> int:
    """Compares runs of earlier directories, or their result.json where the runs are missing.

    Raises:
      UserError: a directory contains neither, or the runs cannot be compared.
    """
    runs, results = _earlier_runs(flags.earlier)
    make_directory(workdir, flag="--workdir")
    with writer_lock(workdir, flag="--workdir"):
        if runs:
            earlier = FinishedRun.load(runs[0]).config["flags"]
            store = open_stores(
                flags.store or stores_of(earlier),
                weights=earlier.get("store_weights"),
                image_size=earlier.get("image_size"),
            )
            measured = next(filter(None, map(_read_cost, flags.earlier)), None)
            results.insert(0, _make_result(store, runs, workdir, measured))
        for directory in flags.earlier:
            if (directory / VIEWS_FILE).exists() and not (workdir / VIEWS_FILE).exists():
                shutil.copy(directory / VIEWS_FILE, workdir / VIEWS_FILE)
        _finish(merge_results(results), workdir)
    return 0


def plan_runs(flags: argparse.Namespace, store: ViewStore) -> list[Job]:
    """Plans a job for each arm, seed and length.

    Raises:
      UserError: one of them cannot work; none has been started.
    """
    live = any(ARMS[arm].live for arm in flags.arms)
    given = flags.teacher or [None] * len(store.stores)
    teachers = [
        find_teacher(part.spec, path, store=part.location)
        for part, path in zip(store.stores if live else (), given if live else (), strict=True)
    ]
    for teacher in teachers:
        check_teacher_exists(teacher)
    # Prepares the embedded default once, before several children would do so at the same time.
    find_data_dir(store.spec, flags.data_dir)
    jobs = []
    for epochs in _lengths(flags, store):
        for seed in flags.seeds:
            for arm in flags.arms:
                jobs.append(_plan_run(flags, store, arm=arm, seed=seed, epochs=epochs, teachers=teachers))
    return jobs


def _is_done(job: Job) -> bool:
    """Whether the run of a job is finished. A damaged run is repeated, or `trainer.train` reports the damage."""
    try:
        return is_finished(job.workdir, steps=job.steps)
    except DataError:
        return False


def _lengths(flags: argparse.Namespace, store: ViewStore) -> list[int]:
    """Lengths of the runs in epochs: `--epochs`, or those of the first command, even if the store has grown."""
    shared = _read_comparison(Path(flags.workdir)) or {}
    recipe = train_recipe(flags.recipe or default_recipe(store.spec))
    lengths: list[int] = flags.epochs or shared.get(EPOCHS) or [int(recipe.epochs or store.epochs)]
    return lengths


def _plan_run(
    flags: argparse.Namespace, store: ViewStore, *, arm: str, seed: int, epochs: int, teachers: Sequence[str]
) -> Job:
    argv = _train_arguments(flags, arm=arm, seed=seed, epochs=epochs, teachers=teachers)
    # The directory of the comparison stands for the run's, which does not affect the options.
    options = resolve(make_train_parser().parse_strictly([*argv, f"--workdir={flags.workdir}"]), store)
    if options.eval_split is None:
        raise UserError(
            f"{store.location}: no evaluation logits of a validation or test split, which a comparison needs; "
            "precompute with --eval_splits=all (the default), or select another split with --eval_split"
        )
    workdir = Path(flags.workdir) / RUNS_DIRECTORY / f"{arm}-seed{seed}-epochs{epochs}"
    return Job(
        name=f"{arm}, seed {seed}, {counted(epochs, 'epoch')}",
        module="trainer.train",
        argv=[*argv, f"--workdir={workdir}"],
        workdir=workdir,
        steps=int(options.length.steps),
    )


def _train_arguments(
    flags: argparse.Namespace, *, arm: str, seed: int, epochs: int, teachers: Sequence[str]
) -> list[str]:
    """Arguments of `trainer.train` without --workdir."""
    argv = [f"--store={store}" for store in flags.store]
    if flags.store_weights is not None:
        argv += [f"--store_weights={','.join(map(str, flags.store_weights))}"]
    argv += [f"--arm={arm}", f"--seed={seed}", *shared_arguments(flags), f"--epochs={epochs}"]
    return argv + ([f"--teacher={teacher}" for teacher in teachers] if ARMS[arm].live else [])


def _cost_job(flags: argparse.Namespace, planned: Sequence[Job], workdir: Path) -> Job | None:
    """The job that measures the time per step; None if it is done or not wanted."""
    if not flags.measure or "online" not in flags.arms or flags.strategy != "default":
        return None
    if _read_cost(workdir) is not None:
        return None
    from trainer.comparison.measure import TURNS

    online = next(job for job in planned if "--arm=online" in job.argv)
    directory = workdir / "measuring"
    return Job(
        name="measuring",
        module="trainer.comparison.measure",
        argv=[*online.argv, f"--output={workdir / COST_FILE}", f"--progress={directory / METRICS_FILE}"],
        workdir=directory,
        steps=TURNS,
    )


def _check_workdir(workdir: Path, *, earlier: Sequence[Path] | None) -> None:
    names = {path.name for path in workdir.iterdir()} if workdir.is_dir() else set()
    known = {COMPARISON_FILE} | ({RESULT_FILE} if earlier is not None else set())
    if names - {LOCK_FILE} and (not names & known or "checkpoints" in names):
        raise UserError(
            f"--workdir={workdir}: contains {min(names)} and no comparison; expected an empty directory or that of an earlier "
            "comparison"
        )


def _shared_settings(flags: argparse.Namespace, store: ViewStore) -> dict[str, Any]:
    """Settings that all runs of a comparison share."""
    common = {name: value for name, value in shared_flags(flags).items() if name not in _FREE}
    return {**common, **store.identity()}


def _check_same(flags: argparse.Namespace, store: ViewStore, workdir: Path) -> None:
    """Checks that the settings are those of the existing runs."""
    if (existing := _read_comparison(workdir)) is None:
        return
    existing.pop(EPOCHS, None)
    sides = ("in this command", "in the existing comparison")
    if lines := differences(_shared_settings(flags, store), existing, sides=sides):
        raise UserError(
            f"--workdir={workdir}: {'; '.join(lines)}; use the same settings, or another --workdir"
        )


def _read_comparison(workdir: Path) -> dict[str, Any] | None:
    """Reads comparison.json: shared settings, and the epochs of the first command; None if there is no comparison."""
    found = _read_own(workdir / COMPARISON_FILE, _Comparison, remedy="use another --workdir")
    return None if found is None else {EPOCHS: [], **found}


def _read_own(path: Path, kind: Any, *, remedy: str) -> dict[str, Any] | None:
    """Reads a file that this command has written; None if it is missing.

    Raises:
      DataError: the file is damaged.
    """
    if not path.exists():
        return None
    try:
        return cast(dict[str, Any], build(kind, read_json(path, limit=FILE_LIMIT)))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: damaged ({error}); {remedy}") from error


def _finished_below(workdir: Path) -> list[Path]:
    """Directories of the finished runs of a comparison; prints which others are left out."""
    runs = sorted(path for path in (workdir / RUNS_DIRECTORY).iterdir() if path.is_dir())
    finished = [path for path in runs if is_finished(path)]
    if unfinished := [path.name for path in runs if path not in finished]:
        print(f"left out, because not finished: {', '.join(unfinished)}", flush=True)
    return finished


def _earlier_runs(directories: Sequence[Path]) -> tuple[list[Path], list[dict[str, Any]]]:
    """Directories of finished runs, and results whose runs are missing.

    Args:
      directories: Directories of comparisons, of single runs, or with a result.json alone.
    """
    runs: list[Path] = []
    results = []
    for directory in directories:
        if (directory / RUNS_DIRECTORY).is_dir():
            below = _finished_below(directory)
            if not below:
                raise UserError(
                    f"--from={directory}: none of its runs is finished; finish them with the command that started them"
                )
            runs += below
        elif (directory / CONFIG_FILE).exists():
            runs.append(directory)
        else:
            results.append(load_result(directory))
    return [*dict.fromkeys(path.resolve() for path in runs)], results


def _read_cost(workdir: Path) -> dict[str, Any] | None:
    """Reads cost.json; None where nothing was measured."""
    return _read_own(workdir / COST_FILE, CostFile, remedy="delete it to repeat the measurement")


def _report_run(job: Job) -> None:
    """Prints the figures of a finished run."""
    run = FinishedRun.load(job.workdir)
    final = run.evaluation
    tqdm.write(
        f"{job.name}: {run.result['eval_split']} top-1 {accuracy_text(final['student_top1'])}, agreement with the teacher "
        f"{final['agreement']:.2%}{unlabeled_text(final)}"
    )


def _make_result(
    store: ViewStore, directories: Sequence[Path], workdir: Path, measured: dict[str, Any] | None
) -> dict[str, Any]:
    """The result of the finished runs in these directories."""
    runs = [FinishedRun.load(path) for path in directories]
    command = f"python -m trainer.compare {shlex.join(sys.argv[1:])}".strip()
    return make_result(store, runs, workdir=workdir, command=command, measured=measured)


def _finish(result: dict[str, Any], workdir: Path) -> None:
    """Writes result.json and the report unless they exist already, and prints the main figures."""
    path, report = workdir / RESULT_FILE, workdir / REPORT_FILE
    if _same_result(path, result) and report.exists():
        print("nothing to do: the comparison is finished", flush=True)
    else:
        write_json(path, result)
        write_report(workdir)
    print(comparison_table(result))
    print(f"figures: {path}; report: {report}")


def _same_result(path: Path, result: dict[str, Any]) -> bool:
    """Whether an existing result is the same, except for its date and command."""
    try:
        existing = build(dict[str, Any], read_json(path, limit=RESULT_LIMIT))
    except (OSError, ValueError):
        return False
    ignored = {"created": None, "command": None}
    return bool({**existing, **ignored} == {**json.loads(json.dumps(result)), **ignored})
