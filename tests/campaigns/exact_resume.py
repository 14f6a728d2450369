"""Kills training runs at random, and checks that they end bit-equal to an undisturbed run.

    python -m tests.campaigns.exact_resume                                    # small stores; ten minutes on 2 cores
    python -m tests.campaigns.exact_resume --kills=5 --store=DIR --student=small --steps=200 --teacher=DIR

Each run is a process of `python -m trainer.train`. SIGKILL ends it at random steps, within a step, a checkpoint or an
evaluation, and the same command continues it. After `--kills` kills it runs to its end. Without flags of the trainer there
are three runs: one offline, one online from its first step, and one across the end of the store.
"""

from __future__ import annotations

import dataclasses
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.cli.main import run_command
from pipeline.cli.parser import Parser, positive, whole
from pipeline.precomputing.worker import ShardWorker
from tests import stores
from tests.runs import (
    ROOT,
    arguments,
    checkpoint_weights,
    command,
    environment,
    metrics,
    run_process,
    scalars,
)
from trainer.run.checkpoints import read_run, saved_path

# Short intervals, so that random kills hit checkpoints and evaluations as often as steps.
FLAGS = ("--deterministic", "--log_every=1", "--checkpoint_every=3", "--eval_every=10")
START_SECONDS = 300  # timeout for the next step on a busy machine


class FinishedError(Exception):
    """The run ended before it could be killed; use more steps."""


@dataclasses.dataclass(frozen=True)
class Kill:
    """A SIGKILL of a running process.

    Attributes:
      planned: Step after which the kill was planned.
      died: Last step in metrics.jsonl; the killed process made at least one.
      saved: Step of the latest checkpoint, or 0.
      run: Run state in that checkpoint.
      interrupted: Names of incomplete files, or `evaluation`; empty within a step.
    """

    planned: int
    died: int
    saved: int
    run: dict[str, Any]
    interrupted: list[str]


def last_line(workdir: Path) -> dict[str, Any]:
    """The last complete line of metrics.jsonl; `{"step": 0}` if there is none."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)[-2:] if path.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    return json.loads(whole[-1]) if whole else {"step": 0, "kind": "train"}


def wait_and_kill(process: subprocess.Popen[str], workdir: Path, *, planned: int, delay: float) -> None:
    """Kills a process `delay` seconds after a step is in metrics.jsonl.

    Raises:
      FinishedError: the process ended by itself.
      TimeoutError: the process did not reach the step.
    """
    deadline = time.monotonic() + START_SECONDS
    while last_line(workdir)["step"] < planned:
        if process.poll() is not None:
            text = process.communicate()[1]
            raise FinishedError(f"exit code {process.returncode} before step {planned}: {text[-2000:]}")
        if time.monotonic() > deadline:
            process.kill()
            raise TimeoutError(f"step {planned} not reached within {START_SECONDS} s")
        time.sleep(0.002)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    if process.wait() != -signal.SIGKILL:
        raise FinishedError(f"exit code {process.returncode}, just before it was killed at step {planned}")


def found_after(workdir: Path, *, planned: int, eval_every: int) -> Kill:
    """The state that a kill left behind."""
    line = last_line(workdir)
    path = saved_path(workdir / "checkpoints")
    run = {"step": 0} if path is None else read_run(path)
    interrupted = [str(file.relative_to(workdir)) for file in half_written(workdir)]
    if line["kind"] == "train" and line["step"] % eval_every == 0 and run["step"] == line["step"]:
        interrupted.append("evaluation")
    return Kill(planned=planned, died=line["step"], saved=run["step"], run=run, interrupted=interrupted)


def half_written(workdir: Path) -> list[Path]:
    """Temporary files, and files of incomplete checkpoints."""
    out = [path for path in workdir.rglob("*") if ".tmp-" in path.name or "_temp" in path.name]
    for data in workdir.rglob("ckpt-*.data-*"):
        if not data.with_name(f"{data.name.split('.')[0]}.index").exists():
            out.append(data)
    return out


def kill_and_continue(argv: list[str], workdir: Path, *, steps: list[int], seed: int = 0) -> list[Kill]:
    """Starts a run once for each given step, and kills it after that step.

    Args:
      argv: Flags of the trainer without `--workdir`.
      workdir: Directory of the run.
      steps: Steps of the kills, ascending; a kill is later if an earlier one was late.
      seed: Random seed of the delays, which are up to about two steps.

    Raises:
      FinishedError: the run ended before a kill.
    """
    eval_every = next(int(flag.split("=")[1]) for flag in argv if flag.startswith("--eval_every="))
    generator, kills = random.Random(seed), []
    started = command([*argv, f"--workdir={workdir}"])
    for number, step in enumerate(steps, 1):
        planned = max(step, kills[-1].died + 1 if kills else 1)
        process = subprocess.Popen(
            started,
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_and_kill(process, workdir, planned=planned, delay=generator.uniform(0, 0.05))
        process.communicate()
        kills.append(found_after(workdir, planned=planned, eval_every=eval_every))
        kill = kills[-1]
        print(
            f"kill {number}: planned at step {kill.planned}, died at {kill.died} in {', '.join(kill.interrupted) or 'a step'}; "
            f"the checkpoint has step {kill.saved}",
            flush=True,
        )
    return kills


def differences(killed: Path, undisturbed: Path) -> list[str]:
    """Differences of two finished runs; empty if they are equal.

    Compares weights and optimizer state of the latest and of the best checkpoint, bit for bit; the lines of metrics.jsonl
    without rates; TensorBoard scalars; evaluations; and names of checkpoint files. Reports leftover files.
    """
    out = []
    for name in ("checkpoints", "checkpoints/best"):
        ours, theirs = (checkpoint_weights(workdir, name) for workdir in (killed, undisturbed))
        if ours.keys() != theirs.keys():
            out.append(f"{name}: other variables")
        out += [f"{name}: {key}" for key in ours if not np.array_equal(ours[key], theirs.get(key))]
    ours, theirs = (_without_rates(metrics(workdir)) for workdir in (killed, undisturbed))
    out += [f"metrics.jsonl: {a} for {b}" for a, b in zip(ours, theirs, strict=False) if a != b][:5]
    if len(ours) != len(theirs):
        out.append(f"metrics.jsonl: {len(ours)} lines for {len(theirs)}")
    shown, expected = (
        {tag: values for tag, values in scalars(workdir).items() if not tag.endswith("views_per_second")}
        for workdir in (killed, undisturbed)
    )
    if shown != expected:
        out.append(f"TensorBoard: {[tag for tag in expected if shown.get(tag) != expected[tag]]}")
    results = [json.loads((workdir / "result.json").read_text()) for workdir in (killed, undisturbed)]
    out += [f"result.json: {key}" for key in ("evaluation", "steps") if results[0][key] != results[1][key]]
    names = [
        sorted(path.name for path in (workdir / "checkpoints").iterdir()) for workdir in (killed, undisturbed)
    ]
    if names[0] != names[1]:
        out.append(f"checkpoints: {names[0]} for {names[1]}")
    return out + [f"left over: {path}" for path in half_written(killed)]


def _without_rates(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "views_per_second"} for line in lines]


def make_runs(root: Path, *, steps: int) -> dict[str, list[str]]:
    """Writes small stores; returns the flags of the three kinds of runs, by name."""
    data_dir, teacher = stores.prepare_photos(root / "data"), stores.save_teacher(root / "teacher")
    spec = stores.make_spec(data_dir, teacher)
    size = 5  # views per step
    out = {}
    for name, epochs, batch_size in (
        ("offline", -(-steps * size // stores.N), size),
        ("online", 1, stores.N + 1),  # the first batch needs one view more than the store has
        ("switch", steps * size // 2 // stores.N, size),
    ):
        worker = ShardWorker(stores.job_for(root / name / "store", spec, data_dir, teacher))
        (root / name).mkdir()
        stores.write_store(worker, epochs=epochs, views_per_shard=1000)
        flags = arguments(root / name / "store", root, data_dir, *FLAGS, f"--steps={steps}")
        flags = [flag for flag in flags if not flag.startswith(("--workdir", "--batch_size"))]
        online = [] if name == "offline" else [f"--teacher={teacher}"]
        out[name] = [*flags, f"--batch_size={batch_size}", *online]
    return out


def random_steps(kills: int, *, steps: int, seed: int) -> list[int]:
    """Ascending steps of the kills, early enough that the run is not finished."""
    return sorted(random.Random(seed).sample(range(1, int(0.85 * steps)), kills))


def run_campaign(name: str, argv: list[str], root: Path, *, kills: list[int], seed: int) -> list[Kill]:
    """Compares a killed run with an undisturbed one.

    Raises:
      AssertionError: they differ; the message lists the differences.
    """
    run_process([*argv, f"--workdir={root / 'undisturbed'}"])
    found = kill_and_continue(argv, root / "killed", steps=kills, seed=seed)
    run_process([*argv, f"--workdir={root / 'killed'}"])
    (root / "kills.jsonl").write_text("".join(json.dumps(dataclasses.asdict(kill)) + "\n" for kill in found))
    wrong = differences(root / "killed", root / "undisturbed")
    if wrong:
        raise AssertionError(f"{name}: different after {len(found)} kills: {'; '.join(wrong)}")
    interrupted = sum(bool(kill.interrupted) for kill in found)
    print(
        f"{name}: bit-equal after {len(found)} kills, {interrupted} of them within a checkpoint or an evaluation",
        flush=True,
    )
    return found


def main(argv: list[str]) -> int:
    """Runs the campaign."""
    parser = Parser(
        prog="python -m tests.campaigns.exact_resume", description="Kills and continues training runs."
    )
    parser.add_argument("--kills", type=positive, default=20, help="Kills per run.")
    parser.add_argument("--kill_seed", type=whole, default=0, help="Random seed of the steps.")
    parser.add_argument("--directory", help="Directory for the runs (default: a temporary one).")
    flags, given = parser.parse_known_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(flags.directory or temporary)
        root.mkdir(parents=True, exist_ok=True)
        steps = 400
        if given:
            steps = next(int(flag.split("=")[1]) for flag in given if flag.startswith("--steps="))
            runs = {"given": [*FLAGS, *given]}
        else:
            runs = make_runs(root, steps=steps)
        for name, run in runs.items():
            kills = random_steps(flags.kills, steps=steps, seed=flags.kill_seed)
            (root / name).mkdir(exist_ok=True)
            run_campaign(name, run, root / name, kills=kills, seed=flags.kill_seed)
    return 0


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
