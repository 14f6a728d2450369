"""Kills training runs and looks whether they end bit-equal to one that nobody disturbed.

    python -m tests.campaigns.exact_resume                                    # small stores; ten minutes on 2 cores
    python -m tests.campaigns.exact_resume --kills=5 --store=DIR --student=small --steps=200 --teacher=DIR

Each run is a process of `python -m trainer.train`, killed with SIGKILL at random steps, in whatever it is doing
then (a step, a checkpoint, an evaluation), and started again with the same command, until it has been killed as
often as asked and may finish. With no flags of the trainer: one run offline, one online from its first step, and one
across the end of the store.
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

# Short intervals: a kill at random then falls into a checkpoint or an evaluation as often as into a step.
FLAGS = ("--deterministic", "--log_every=1", "--checkpoint_every=3", "--eval_every=10")
START_SECONDS = 300  # for a process to come to its next step, on a busy machine


class FinishedError(Exception):
    """The run came to its end before it could be killed; ask for more steps."""


@dataclasses.dataclass(frozen=True)
class Kill:
    """One SIGKILL that hit a run at work.

    Attributes:
      asked: step after which it was to be killed.
      died: last step in metrics.jsonl; at least one was made by the process that was killed.
      saved: step of the checkpoint that was there then, or 0.
      run: what that checkpoint says of its run.
      amid: what it died in: names of files half written, `evaluation`, or nothing for a step.
    """

    asked: int
    died: int
    saved: int
    run: dict[str, Any]
    amid: list[str]


def last_line(workdir: Path) -> dict[str, Any]:
    """The last whole line of metrics.jsonl; `{"step": 0}` where there is none."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)[-2:] if path.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    return json.loads(whole[-1]) if whole else {"step": 0, "kind": "train"}


def wait_and_kill(process: subprocess.Popen[str], workdir: Path, *, asked: int, delay: float) -> None:
    """Kills a process some seconds after a step is in metrics.jsonl.

    Raises:
      FinishedError: it ended by itself.
      TimeoutError: it never came so far.
    """
    deadline = time.monotonic() + START_SECONDS
    while last_line(workdir)["step"] < asked:
        if process.poll() is not None:
            text = process.communicate()[1]
            raise FinishedError(f"exit code {process.returncode} before step {asked}: {text[-2000:]}")
        if time.monotonic() > deadline:
            process.kill()
            raise TimeoutError(f"not at step {asked} after {START_SECONDS} s")
        time.sleep(0.002)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    if process.wait() != -signal.SIGKILL:
        raise FinishedError(f"exit code {process.returncode}, just before it was killed at step {asked}")


def found_after(workdir: Path, *, asked: int, eval_every: int) -> Kill:
    """What a kill has left."""
    line = last_line(workdir)
    path = saved_path(workdir / "checkpoints")
    run = {"step": 0} if path is None else read_run(path)
    amid = [str(file.relative_to(workdir)) for file in half_written(workdir)]
    if line["kind"] == "train" and line["step"] % eval_every == 0 and run["step"] == line["step"]:
        amid.append("evaluation")
    return Kill(asked=asked, died=line["step"], saved=run["step"], run=run, amid=amid)


def half_written(workdir: Path) -> list[Path]:
    """Files that are no part of a whole checkpoint, and temporaries."""
    out = [path for path in workdir.rglob("*") if ".tmp-" in path.name or "_temp" in path.name]
    for data in workdir.rglob("ckpt-*.data-*"):
        if not data.with_name(f"{data.name.split('.')[0]}.index").exists():
            out.append(data)
    return out


def kill_and_continue(argv: list[str], workdir: Path, *, steps: list[int], seed: int = 0) -> list[Kill]:
    """Starts a run as often as there are steps, and kills it at each.

    Args:
      argv: flags of the trainer, but `--workdir`.
      workdir: of the run.
      steps: after which it is killed, in order; later, if it had been killed later before.
      seed: of the delays, up to twice the time of a step or so.

    Raises:
      FinishedError: a kill came too late.
    """
    eval_every = next(int(flag.split("=")[1]) for flag in argv if flag.startswith("--eval_every="))
    generator, kills = random.Random(seed), []
    started = command([*argv, f"--workdir={workdir}"])
    for number, step in enumerate(steps, 1):
        asked = max(step, kills[-1].died + 1 if kills else 1)
        process = subprocess.Popen(
            started,
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_and_kill(process, workdir, asked=asked, delay=generator.uniform(0, 0.05))
        process.communicate()
        kills.append(found_after(workdir, asked=asked, eval_every=eval_every))
        kill = kills[-1]
        print(
            f"kill {number}: asked for at step {kill.asked}, died at {kill.died} in {', '.join(kill.amid) or 'a step'}; "
            f"the checkpoint holds step {kill.saved}",
            flush=True,
        )
    return kills


def differences(killed: Path, undisturbed: Path) -> list[str]:
    """What of two finished runs is not the same; nothing, if all is well.

    Compared are: weights and optimizer state of the last and of the best checkpoint, bit for bit; the lines of
    metrics.jsonl but for rates, each step once; what TensorBoard is told; evaluations; and what lies around.
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
    """Flags of the three kinds of runs on small stores that are made here, by name."""
    data_dir, teacher = stores.prepare_photos(root / "data"), stores.save_teacher(root / "teacher")
    spec = stores.make_spec(data_dir, teacher)
    size = 5  # views a step
    out = {}
    for name, epochs, batch_size in (
        ("offline", -(-steps * size // stores.N), size),
        ("online", 1, stores.N + 1),  # the first batch needs a view more than there is
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
    """Steps to be killed at, in order; none so late that the run could be finished."""
    return sorted(random.Random(seed).sample(range(1, int(0.85 * steps)), kills))


def run_campaign(name: str, argv: list[str], root: Path, *, kills: list[int], seed: int) -> list[Kill]:
    """One run killed and one left alone, compared.

    Raises:
      AssertionError: they differ; lists in what.
    """
    run_process([*argv, f"--workdir={root / 'undisturbed'}"])
    found = kill_and_continue(argv, root / "killed", steps=kills, seed=seed)
    run_process([*argv, f"--workdir={root / 'killed'}"])
    (root / "kills.jsonl").write_text("".join(json.dumps(dataclasses.asdict(kill)) + "\n" for kill in found))
    wrong = differences(root / "killed", root / "undisturbed")
    if wrong:
        raise AssertionError(f"{name}: not the same after {len(found)} kills: {'; '.join(wrong)}")
    amid = sum(bool(kill.amid) for kill in found)
    print(
        f"{name}: bit-equal after {len(found)} kills, {amid} of them in a checkpoint or an evaluation",
        flush=True,
    )
    return found


def main(argv: list[str]) -> int:
    """The command; see the module's docstring."""
    parser = Parser(
        prog="python -m tests.campaigns.exact_resume", description="Kills and continues training runs."
    )
    parser.add_argument("--kills", type=positive, default=20, help="of each run")
    parser.add_argument("--kill_seed", type=whole, default=0, help="of the steps that runs are killed at")
    parser.add_argument("--directory", help="for the runs; by default a temporary one")
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
