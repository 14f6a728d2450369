"""Measures the peak memory of precompute and trainer for a short store and for one a hundred times as long.

    python tests/benchmarks/memory.py [--epochs=2,200] [--examples=400]

Uses the embedded default with many small shards. The memory must not grow with epochs or shards.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from pipeline.cli.main import run_command
from pipeline.cli.parser import Parser

# Runs a module, and prints its peak resident size in KiB as the last line.
_RUN = (
    "import resource, runpy, sys\n"
    "sys.argv = sys.argv[1:]\n"
    "try:\n    runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)\n"
    "finally:\n    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
)


def peak_bytes(command: list[str]) -> int:
    """Peak resident size of `python -m ...`."""
    done = subprocess.run(
        [sys.executable, "-c", _RUN, *command], stdout=subprocess.PIPE, text=True, check=True
    )
    return int(done.stdout.split()[-1]) * 1024


def main(argv: list[str]) -> int:
    """Runs the benchmark."""
    parser = Parser(prog="memory.py")
    parser.add_argument("--epochs", default="2,200", help="Epochs of the short and of the long store.")
    parser.add_argument("--examples", type=int, default=400, help="Number of training examples.")
    flags = parser.parse_strictly(argv)
    rows = []
    for epochs in map(int, flags.epochs.split(",")):
        with tempfile.TemporaryDirectory() as directory:
            store = Path(directory) / "store"
            precompute = peak_bytes(
                [
                    "pipeline.precompute",
                    "--runner=DirectRunner",
                    f"--store={store}",
                    f"--split=train[:{flags.examples}]",
                    f"--epochs={epochs}",
                    f"--views_per_shard={flags.examples}",
                    "--eval_splits=test",
                ]
            )
            train = peak_bytes(
                [
                    "trainer.train",
                    f"--store={store}",
                    f"--workdir={directory}/run",
                    "--allow_short_run",
                    "--batch_size=64",
                ]
            )
        rows.append((epochs, precompute, train))
    for epochs, precompute, train in rows:
        print(
            f"{epochs} epochs: precompute {precompute / 1e6:,.0f} MB, trainer {train / 1e6:,.0f} MB at their peaks"
        )
    short, long = rows[0], rows[-1]
    print(f"long against short: precompute {long[1] / short[1]:.3f}, trainer {long[2] / short[2]:.3f}")
    return 0


if __name__ == "__main__":
    run_command(main)
