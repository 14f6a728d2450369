"""Runs the whole pipeline on the embedded default: `python -m trainer.demo` (`make demo`).

Runs three commands in their own processes: precompute, training, and the comparison of a student trained offline with
one trained online. Then prints a small table. The first time takes about four minutes on two cores; finished stages are
not repeated.
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
    """Runs `python` with a command line and prints it.

    Returns:
      Seconds of the stage.

    Raises:
      ChildError: a signal killed the process.
      SystemExit: the process failed; it has the same exit code.
    """
    print(f"\n[{name}] python {' '.join(command)}", flush=True)
    started = time.monotonic()
    # Not `subprocess.run`, which kills the process 0.25 s after Ctrl-C; the process receives the signal too and saves.
    with subprocess.Popen([sys.executable, *command]) as process:
        # SIGTERM reaches this process only, for example when a container is stopped.
        before = signal.signal(signal.SIGTERM, lambda number, _: process.send_signal(number))
        try:
            code = process.wait()
        except KeyboardInterrupt:
            code = process.wait()
        finally:
            signal.signal(signal.SIGTERM, before)
    code = exit_code(code)
    if (killed := ended_by_signal(code, less_memory="close other programs")) is not None:
        raise ChildError(f"{name}: {killed}", exit_code=code)
    if code:
        raise SystemExit(code)
    return time.monotonic() - started


def table(rows: list[tuple[str, str]]) -> str:
    """Formats rows as two aligned columns."""
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"  {label:<{width}}  {value}" for label, value in rows)


def main(argv: list[str]) -> int:
    """Runs the three stages and prints the table."""
    parser = Parser(
        prog="python -m trainer.demo",
        description="Runs precompute, training and comparison on the embedded default.",
        examples=["python -m trainer.demo", "python -m trainer.demo --workdir=/tmp/demo"],
    )
    parser.group("output").add_argument(
        "--workdir",
        type=file_path,
        default="runs/demo",
        help="Directory for the store, the student and the comparison.",
    )
    directory = Path(parser.parse_strictly(argv).workdir)
    store, workdir, compared = directory / "store", directory / "student", directory / "compare"
    precompute = run_stage(
        "precompute", ["-m", "pipeline.precompute", "--runner=DirectRunner", f"--store={store}"]
    )
    train = run_stage("train", ["-m", "trainer.train", f"--store={store}", f"--workdir={workdir}"])
    # Deterministic, with the loss of every step logged: the two curves must be equal.
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
    print(f"\n{table(rows)}\n\nreport: {compared / 'report.html'}")
    return 0
