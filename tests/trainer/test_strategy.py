"""trainer.strategy: step t trains on the same views with any number of replicas."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import UserError
from tests.runs import environment
from trainer.strategy import make_strategy, replica_batch_size, replica_starts

BATCH, EXAMPLES, STEPS = 8, 17, 6


@pytest.mark.parametrize(("replicas", "pipelines"), [(1, 1), (2, 1), (4, 1), (2, 2), (4, 2), (8, 4)])
def test_replicas_share_a_steps_views_without_gap_or_overlap(replicas: int, pipelines: int):
    size = replica_batch_size(BATCH, replicas)
    taken: dict[int, list[int]] = {step: [] for step in range(2, 5)}
    for pipeline in range(pipelines):
        starts = replica_starts(
            2, 5, batch_size=BATCH, replicas=replicas, pipeline=pipeline, pipelines=pipelines
        )
        for number, start in enumerate(starts.as_numpy_iterator()):
            taken[2 + number // (replicas // pipelines)] += range(start, start + size)
    assert taken == {step: list(range(step * BATCH, (step + 1) * BATCH)) for step in taken}


def test_batch_that_replicas_cannot_share_is_refused():
    with pytest.raises(UserError, match="--batch_size=10: not a multiple of the 4 replicas"):
        replica_batch_size(10, 4)


def test_unknown_strategy_and_misplaced_replicas_are_refused():
    with pytest.raises(UserError, match="--strategy=pods: expected one of default, mirrored"):
        make_strategy("pods")
    with pytest.raises(UserError, match="--replicas=2: only --strategy=mirrored"):
        make_strategy("default", replicas=2)


def losses_of(store: Path, data_dir: Path, workdir: Path, *flags: str) -> list[float]:
    """Losses of a real run in a process of its own: logical devices are made before TensorFlow starts."""
    command = [
        *(sys.executable, "-m", "trainer.train", f"--store={store}", f"--data_dir={data_dir}"),
        *(f"--workdir={workdir}", "--student=tiny", f"--batch_size={BATCH}", f"--steps={STEPS}"),
        *("--log_every=1", "--eval_every=3", "--warmup_steps=1", *flags),
    ]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["kind"] == "train"]


@pytest.mark.slow
def test_losses_do_not_depend_on_the_number_of_replicas(
    published_store: Path, data_dir: Path, tmp_path: Path
):
    alone = losses_of(published_store, data_dir, tmp_path / "1")
    assert len(alone) == STEPS
    for replicas in (2, 4):
        shared = losses_of(
            published_store,
            data_dir,
            tmp_path / str(replicas),
            "--strategy=mirrored",
            f"--replicas={replicas}",
        )
        # Group norm: only the order of float32 sums differs.
        np.testing.assert_allclose(shared, alone, rtol=1e-4)
