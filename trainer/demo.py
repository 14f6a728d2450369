"""The main job on the embedded default, as a user would run it: `python -m trainer.demo` (`make demo`).

Three commands in processes of their own, precompute, training, and the comparison of a student trained offline with
one trained online; and a small table. About four minutes on two cores the first time; what is done is not done again.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take seconds
    from pipeline.cli.main import run_module

    run_module("trainer.demo")

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pipeline.cli.parser import Parser, file_path
from trainer.run.child_runs import ChildError, ended_by_signal, exit_code


def run_stage(name: str, command: list[str]) -> float:
    """Runs `python -m ...`, shows the command, and gives its seconds; ends with its exit code if it fails."""
    print(f"\n[{name}] python {' '.join(command)}", flush=True)
    begun = time.monotonic()
    # Not `subprocess.run`, which kills it a quarter of a second after a Ctrl-C: it has that signal too, and saves.
    with subprocess.Popen([sys.executable, *command]) as process:
        # SIGTERM comes to this process alone, as from a container that is stopped.
        before = signal.signal(signal.SIGTERM, lambda number, _: process.send_signal(number))
        try:
            code = process.wait()
        except KeyboardInterrupt:
            code = process.wait()
        finally:
            signal.signal(signal.SIGTERM, before)
    code = exit_code(code)
    if (killed := ended_by_signal(code, less_memory="end other programs")) is not None:
        raise ChildError(f"{name}: {killed}", exit_code=code)
    if code:
        raise SystemExit(code)
    return time.monotonic() - begun


def table(rows: list[tuple[str, str]]) -> str:
    """Two aligned columns."""
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"  {label:<{width}}  {value}" for label, value in rows)


def main(argv: list[str]) -> int:
    """The command; see the module's docstring."""
    parser = Parser(
        prog="python -m trainer.demo",
        description="Precompute, training, and offline against online, on the embedded default.",
    )
    parser.add_argument(
        "--workdir", type=file_path, default="runs/demo", help="for the store and the student"
    )
    directory = Path(parser.parse_strictly(argv).workdir)
    store, workdir, compared = directory / "store", directory / "student", directory / "compare"
    precompute = run_stage(
        "precompute", ["-m", "pipeline.precompute", "--runner=DirectRunner", f"--store={store}"]
    )
    train = run_stage("train", ["-m", "trainer.train", f"--store={store}", f"--workdir={workdir}"])
    # Every step's loss, and nothing left to chance: the two curves are to be the same.
    compare = ["-m", "trainer.compare", f"--store={store}", f"--workdir={compared}"]
    comparison = run_stage("compare", [*compare, "--deterministic", "--log_every=1"])
    result: dict[str, Any] = json.loads((workdir / "result.json").read_text())
    test = result["evaluation"]["test"]
    rows = [
        ("teacher accuracy (test)", f"{test['teacher_top1']:.1%}"),
        ("student accuracy (test)", f"{test['student_top1']:.1%}"),
        ("teacher agreement (test)", f"{test['agreement']:.1%}"),
        ("seconds of precompute", f"{precompute:.1f}"),
        ("seconds of training", f"{train:.1f}"),
        ("seconds of the comparison", f"{comparison:.1f}"),
        ("teacher passes in training", str(result["teacher_forward_passes"])),
        ("bytes of the store", f"{result['store_bytes']:,}"),
    ]
    print(f"\n{table(rows)}\n\noffline against online: {compared / 'report.html'}")
    return 0
