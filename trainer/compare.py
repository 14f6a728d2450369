"""Offline against online, and the settings that fail: `python -m trainer.compare --store=DIR --workdir=DIR`.

Trains one student once for each arm (`trainer.targets.arms`), seed and length, from the same initial weights under the same
schedule, as child processes; measures what a step costs online and offline; writes `result.json` and a report. Each
run is one of `trainer.train` in a directory of its own below `runs/`: after an interruption the same command
continues it, and what is finished is not done again. More arms, seeds or lengths in the same directory join those
that are there.

    python -m trainer.compare --store=runs/mnist_5k/store --workdir=runs/mnist_5k/compare          # two minutes
    python -m trainer.compare --workdir=DIR --from=DIR1,DIR2       # the same report from earlier runs, no training
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
from typing import Any, cast

from tqdm import tqdm

from pipeline.cli.parser import make_directory
from pipeline.cli.units import counted
from pipeline.errors import DataError, UserError
from pipeline.inputs.locate import check_teacher_exists, find_data_dir, find_teacher, open_dataset
from pipeline.storage.checked_json import build, read_json
from pipeline.storage.files import remove_temporaries, write_json
from pipeline.storage.lock import LOCK_FILE, writer_lock
from pipeline.store.reader import Store
from pipeline.store.spec import differences
from trainer.comparison.finished import FinishedRun, is_finished
from trainer.comparison.result_file import RESULT_LIMIT, load_result, merge_results
from trainer.comparison.result_schema import CostFile
from trainer.comparison.summary import summarize
from trainer.config.recipes import train_recipe
from trainer.config.run_files import (
    COMPARISON_FILE,
    CONFIG_FILE,
    FILE_LIMIT,
    METRICS_FILE,
    RESULT_FILE,
    RUNS_DIRECTORY,
)
from trainer.flags.compare import parse
from trainer.flags.train import make_parser as make_train_parser
from trainer.flags.train import shared_arguments, shared_flags
from trainer.pages.report import REPORT_FILE, write_report
from trainer.pages.view_grid import VIEWS_FILE, save_views
from trainer.run.child_runs import Job, run_jobs
from trainer.run.describe import comparison_table
from trainer.run.evaluation import accuracy_text, unlabeled_text
from trainer.run.options import default_recipe, resolve
from trainer.targets.arms import ARMS

EPOCHS = "epochs"  # in comparison.json: those of the first command
COST_FILE = "cost.json"  # what `trainer.comparison.measure` wrote
# Flags that may differ from command to command in one directory: no figure depends on them.
_FREE = (
    "data_dir",
    "data_cache_bytes",
    "shard_cache_bytes",
    "image_cache_bytes",
    "input_buffer_bytes",
    "eval_batch_size",
    "checkpoint_every",
)


def main(argv: list[str]) -> int:
    """The command; see the module's docstring."""
    flags = parse(argv)
    workdir = Path(flags.workdir)
    _check_workdir(workdir, earlier=flags.earlier)
    if flags.earlier is not None:
        return _compare_earlier(flags, workdir)
    store = Store(flags.store, shard_cache_bytes=flags.shard_cache_bytes)
    store.check_files()
    planned = plan_runs(flags, store)
    _check_same(flags, store, workdir)
    make_directory(workdir, flag="--workdir")
    with writer_lock(workdir, flag="--workdir"):
        remove_temporaries(workdir)
        if not (workdir / COMPARISON_FILE).exists():
            begun = {**_identity(flags, store), EPOCHS: _lengths(flags, store)}
            write_json(workdir / COMPARISON_FILE, begun)
        jobs = [job for job in planned if not is_finished(job.workdir, steps=job.steps)]
        print(f"{len(planned)} runs, {len(planned) - len(jobs)} of them finished", flush=True)
        run_jobs(jobs, parallel=flags.parallel, on_finished=_tell)
        if (cost := _cost_job(flags, planned, workdir)) is not None:
            print("measuring the time per step, online and offline", flush=True)
            shutil.rmtree(cost.workdir, ignore_errors=True)  # the progress of one that was interrupted
            cost.workdir.mkdir()
            run_jobs([cost], parallel=1, on_finished=lambda _: None, unit=" turns")
            shutil.rmtree(cost.workdir)
        result = _summarize(store, _finished_below(workdir), workdir, _measured(workdir))
        if not (workdir / VIEWS_FILE).exists():
            dataset = open_dataset(
                store, "views", data_dir=flags.data_dir, data_cache_bytes=flags.data_cache_bytes
            )
            save_views(store, dataset, workdir / VIEWS_FILE)
        _finish(result, workdir)
    return 0


def _compare_earlier(flags: argparse.Namespace, workdir: Path) -> int:
    """Compares runs of earlier directories: anew where they are there, else as their result.json says.

    Raises:
      UserError: a directory holds neither, or what they hold is not to be compared.
    """
    runs, results = _earlier_runs(flags.earlier)
    make_directory(workdir, flag="--workdir")
    with writer_lock(workdir, flag="--workdir"):
        if runs:
            store = Store(flags.store or FinishedRun.load(runs[0]).config["flags"]["store"])
            measured = next(filter(None, map(_measured, flags.earlier)), None)
            results.insert(0, _summarize(store, runs, workdir, measured))
        for directory in flags.earlier:
            if (directory / VIEWS_FILE).exists() and not (workdir / VIEWS_FILE).exists():
                shutil.copy(directory / VIEWS_FILE, workdir / VIEWS_FILE)
        _finish(merge_results(results), workdir)
    return 0


# What is to be run.


def plan_runs(flags: argparse.Namespace, store: Store) -> list[Job]:
    """A job for each arm, seed and length.

    Raises:
      UserError: one of them cannot work: before any is begun.
    """
    live = any(ARMS[arm].live for arm in flags.arms)
    teacher = find_teacher(store.spec, flags.teacher, store=store.location) if live else None
    if teacher is not None:
        check_teacher_exists(teacher)
    # Here, for several children at once would each make the embedded default.
    find_data_dir(store.spec, flags.data_dir)
    jobs = []
    for epochs in _lengths(flags, store):
        for seed in flags.seeds:
            for arm in flags.arms:
                jobs.append(_plan_run(flags, store, arm=arm, seed=seed, epochs=epochs, teacher=teacher))
    return jobs


def _lengths(flags: argparse.Namespace, store: Store) -> list[int]:
    """Epochs of the runs: as asked; else of those that the comparison began with, though the store may have grown."""
    begun = _read_comparison(Path(flags.workdir)) or {}
    recipe = train_recipe(flags.recipe or default_recipe(store.spec))
    found: list[int] = flags.epochs or begun.get(EPOCHS) or [int(recipe.epochs or store.epochs)]
    return found


def _plan_run(
    flags: argparse.Namespace, store: Store, *, arm: str, seed: int, epochs: int, teacher: str | None
) -> Job:
    argv = _train_arguments(flags, arm=arm, seed=seed, epochs=epochs, teacher=teacher)
    # Below the directory whose name is to say what the options come to.
    options = resolve(make_train_parser().parse_strictly([*argv, f"--workdir={flags.workdir}"]), store)
    if options.eval_split is None:
        raise UserError(
            f"{store.location} has no evaluation logits of a validation or test split, by which students are compared; "
            "precompute with --eval_splits=all (the default), or name one with --eval_split"
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
    flags: argparse.Namespace, *, arm: str, seed: int, epochs: int, teacher: str | None
) -> list[str]:
    """Arguments of `trainer.train`, without --workdir."""
    argv = [f"--store={flags.store}", f"--arm={arm}", f"--seed={seed}", *shared_arguments(flags)]
    argv += [f"--epochs={epochs}"]
    return argv + ([f"--teacher={teacher}"] if ARMS[arm].live else [])


def _cost_job(flags: argparse.Namespace, planned: Sequence[Job], workdir: Path) -> Job | None:
    """The measurement, if it is asked for and not done."""
    if not flags.measure or "online" not in flags.arms or flags.strategy != "default":
        return None
    if _measured(workdir) is not None:
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


# The directory.


def _check_workdir(workdir: Path, *, earlier: Sequence[Path] | None) -> None:
    names = {path.name for path in workdir.iterdir()} if workdir.is_dir() else set()
    known = {COMPARISON_FILE} | ({RESULT_FILE} if earlier is not None else set())
    if names - {LOCK_FILE} and (not names & known or "checkpoints" in names):
        raise UserError(
            f"--workdir={workdir}: not empty and not a comparison's directory ({min(names)}, ...); name another"
        )


def _identity(flags: argparse.Namespace, store: Store) -> dict[str, Any]:
    """What all runs of a directory have in common."""
    common = {name: value for name, value in shared_flags(flags).items() if name not in _FREE}
    return {"spec": store.spec.digest(), **common}


def _check_same(flags: argparse.Namespace, store: Store, workdir: Path) -> None:
    """Refuses other flags than those of the runs that are there.

    Raises:
      UserError: both sides are shown.
    """
    if (there := _read_comparison(workdir)) is None:
        return
    there.pop(EPOCHS, None)
    lines = differences(_identity(flags, store), there, sides=("asked for", "in the comparison there"))
    if lines:
        raise UserError(
            f"--workdir={workdir}: {'; '.join(lines)}; ask for the same, or use another --workdir"
        )


def _read_comparison(workdir: Path) -> dict[str, Any] | None:
    """What the runs of a comparison have in common, and the epochs that it began with; None before its begin.

    Raises:
      DataError: the file is damaged.
    """
    path = workdir / COMPARISON_FILE
    if not path.exists():
        return None
    try:
        found = build(dict[str, Any], read_json(path, limit=FILE_LIMIT))
        found[EPOCHS] = build(list[int], found.get(EPOCHS, []))
    except ValueError as error:
        raise DataError(
            f"{path}: not what a comparison's runs have in common ({error}); name another --workdir"
        ) from error
    return found


def _finished_below(workdir: Path) -> list[Path]:
    """Directories of the finished runs of a comparison."""
    return [path for path in sorted((workdir / RUNS_DIRECTORY).iterdir()) if is_finished(path)]


def _earlier_runs(directories: Sequence[Path]) -> tuple[list[Path], list[dict[str, Any]]]:
    """The directories of finished runs, of comparisons or single ones; and results of which nothing else is left.

    Raises:
      UserError: a directory holds neither.
    """
    runs: list[Path] = []
    results = []
    for directory in directories:
        if (directory / RUNS_DIRECTORY).is_dir():
            below = _finished_below(directory)
            if not below:
                raise UserError(
                    f"--from={directory}: no run there is finished; finish it with its command first"
                )
            runs += below
        elif (directory / CONFIG_FILE).exists():
            runs.append(directory)
        else:
            results.append(load_result(directory))
    return [*dict.fromkeys(path.resolve() for path in runs)], results


def _measured(workdir: Path) -> dict[str, Any] | None:
    path = workdir / COST_FILE
    if not path.exists():
        return None
    try:
        found = build(CostFile, read_json(path, limit=FILE_LIMIT))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a measurement ({error}); remove it, to measure again") from error
    return cast(dict[str, Any], found)


# What is told.


def _tell(job: Job) -> None:
    """After a run."""
    run = FinishedRun.load(job.workdir)
    final = run.evaluation
    tqdm.write(
        f"{job.name}: {run.result['eval_split']} top-1 {accuracy_text(final['student_top1'])}, agreement with the teacher "
        f"{final['agreement']:.2%}{unlabeled_text(final)}"
    )


def _summarize(
    store: Store, directories: Sequence[Path], workdir: Path, measured: dict[str, Any] | None
) -> dict[str, Any]:
    """The result of the finished runs in some directories."""
    runs = [FinishedRun.load(path) for path in directories]
    command = f"python -m trainer.compare {shlex.join(sys.argv[1:])}".strip()
    return summarize(store, runs, workdir=workdir, command=command, measured=measured)


def _finish(result: dict[str, Any], workdir: Path) -> None:
    """Writes result.json and the report, and says what is in them; nothing new if they are there."""
    path, report = workdir / RESULT_FILE, workdir / REPORT_FILE
    if _same_result(path, result) and report.exists():
        print("nothing to do: the comparison there is finished", flush=True)
    else:
        write_json(path, result)
        write_report(workdir)
    print(comparison_table(result))
    print(f"figures: {path}; report: {report}")


def _same_result(path: Path, result: dict[str, Any]) -> bool:
    """Whether a result that is there says the same, but for when and by which command it was asked."""
    try:
        there = build(dict[str, Any], read_json(path, limit=RESULT_LIMIT))
    except (OSError, ValueError):
        return False
    asked = {"created": None, "command": None}
    return bool({**there, **asked} == {**json.loads(json.dumps(result)), **asked})
