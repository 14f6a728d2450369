"""Training runs with some number of replicas, in one process.

    python -m tests.replica_runs STORE DATA_DIR WORKDIR REPLICAS RUN ...

Each of `RUNS` is the command's, in `WORKDIR/REPLICAS/RUN`; its output is in `WORKDIR/REPLICAS/RUN.txt`.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from pathlib import Path

from trainer import train
from trainer.step import loss_scaling

BATCH, STEPS = 8, 6
RUNS = {
    "group_norm": ["--student=tiny"],
    "batch_norm": ["--student=tests.own_students:batch_norm"],
    "sync_batch_norm": ["--student=tests.own_students:batch_norm", "--sync_batch_norm"],
    "float16": ["--student=tiny", "--precision=float16"],
    "overflow": ["--student=tiny", "--precision=float16"],
    "dropout": ["--student=tests.own_students:nested", "--sync_batch_norm"],
}
FLAGS = [
    *(
        f"--batch_size={BATCH}",
        f"--steps={STEPS}",
        "--warmup_steps=1",
        "--learning_rate=0.01",
        "--deterministic",
    ),
    *("--log_every=1", "--eval_every=3"),
]


# A process can have one strategy: TensorFlow numbers its collectives, and a second one would begin again.
train.make_strategy = functools.cache(train.make_strategy)


def run_all(store: str, data_dir: str, workdir: Path, replicas: int, names: list[str]) -> None:
    """Runs the named entries of `RUNS`. Every step of `overflow` does."""
    strategy = ["--strategy=mirrored", f"--replicas={replicas}"] if replicas > 1 else []
    usual = loss_scaling.INITIAL_SCALE
    for name in names:
        loss_scaling.INITIAL_SCALE = 2.0**40 if name == "overflow" else usual
        found = [f"--store={store}", f"--data_dir={data_dir}", f"--workdir={workdir / str(replicas) / name}"]
        (workdir / str(replicas)).mkdir(parents=True, exist_ok=True)
        with (workdir / str(replicas) / f"{name}.txt").open("w") as file, contextlib.redirect_stdout(file):
            train.main([*found, *FLAGS, *RUNS[name], *strategy])


if __name__ == "__main__":
    run_all(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), sys.argv[5:])
