"""trainer.distribution.strategy: step t trains on the same views with any number of replicas."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from pipeline.errors import UserError
from pipeline.inputs.dataset import Dataset
from pipeline.store.reader import StoreReader
from tests import stores
from tests.replica_runs import BATCH, RUNS, STEPS
from tests.runs import ROOT, environment, metrics
from trainer.config.run_length import replica_batch_size
from trainer.distribution.strategy import make_strategy, replica_starts
from trainer.targets.batches import Targets


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


@pytest.mark.parametrize(("replicas", "pipelines"), [(1, 1), (4, 1), (4, 2)])
def test_batches_of_all_replicas_have_the_views_of_the_step(
    published_store: Path, data_dir: Path, replicas: int, pipelines: int
):
    dataset = Dataset(stores.DATASET, "train", data_dir=data_dir)
    targets = Targets(StoreReader(published_store), dataset, batch_size=BATCH, replicas=replicas)
    views: list[int] = []
    for number in range(pipelines):
        context = tf.distribute.InputContext(pipelines, number, replicas)
        for batch in targets.batches(1, 3, context=context).as_numpy_iterator():
            views += batch["views"].tolist()
    assert sorted(views) == list(range(BATCH, 3 * BATCH))


def test_batch_that_replicas_cannot_share_is_refused():
    with pytest.raises(UserError, match=r"--batch_size=10: .*4 replicas"):
        replica_batch_size(10, 4)


def test_unknown_strategy_and_misplaced_replicas_are_refused():
    with pytest.raises(UserError, match=r"--strategy=pods: .*default, mirrored"):
        make_strategy("pods")
    with pytest.raises(UserError, match=r"--replicas=2: .*--strategy=mirrored"):
        make_strategy("default", replicas=2)
    with pytest.raises(UserError, match=r"--tpu=local: .*--strategy=tpu.*--strategy=mirrored"):
        make_strategy("mirrored", tpu="local")


@pytest.fixture(scope="module")
def replica_runs(published_store: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of runs with 1, 2 and 4 replicas, in three parallel processes."""
    workdir = tmp_path_factory.mktemp("replicas")
    names = {1: [*RUNS], 2: [*RUNS], 4: ["group_norm"]}
    processes = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.replica_runs", str(published_store), str(data_dir)),
                *(str(workdir), str(replicas), *names[replicas]),
            ],
            cwd=ROOT,
            env=environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        for replicas in names
    ]
    for process in processes:
        _, text = process.communicate()
        assert process.returncode == 0, text[-2000:]
    return workdir


def losses_of(directory: Path) -> list[float]:
    """Losses of all training steps, then of all evaluations."""
    lines = metrics(directory, "train")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    evaluations = [line["distillation_loss"] for line in metrics(directory, "eval_test")]
    assert len(evaluations) == 2
    return [line["loss"] for line in lines] + evaluations


@pytest.mark.slow
@pytest.mark.parametrize(("name", "replicas"), [("group_norm", 2), ("group_norm", 4), ("sync_batch_norm", 2)])
def test_losses_do_not_depend_on_the_number_of_replicas(replica_runs: Path, name: str, replicas: int):
    alone, shared = (losses_of(replica_runs / str(count) / name) for count in (1, replicas))
    # Only the order of float32 sums differs. The measured difference is 6e-7, and grows with the steps.
    np.testing.assert_allclose(shared, alone, rtol=1e-5)


@pytest.mark.slow
def test_replicas_of_a_float16_run_scale_and_skip_together(replica_runs: Path):
    # Sums over the views of a replica round to float16.
    np.testing.assert_allclose(*(losses_of(replica_runs / f"{n}/float16") for n in (2, 1)), rtol=0.01)
    for replicas in (1, 2):
        lines = metrics(replica_runs / f"{replicas}/overflow", "train")
        assert [line["skipped_steps"] for line in lines] == [*range(1, STEPS + 1)]
        assert [line["loss_scale"] for line in lines] == [2.0**40 / 2**n for n in range(1, STEPS + 1)]
        assert (
            f"{STEPS} of {STEPS} steps were skipped"
            in (replica_runs / f"{replicas}/overflow.txt").read_text()
        )


@pytest.mark.slow
def test_batch_norm_depends_on_the_number_of_replicas_which_is_reported(replica_runs: Path):
    alone, shared, together = (
        losses_of(replica_runs / name) for name in ("1/batch_norm", "2/batch_norm", "1/sync_batch_norm")
    )
    assert np.abs(np.divide(shared, alone) - 1).max() > 1e-3
    # With one replica there is nothing to synchronize. (Moving variances differ: Keras's fused kernel takes n - 1.)
    np.testing.assert_allclose(together[:STEPS], alone[:STEPS], rtol=1e-5)
    (line,) = [
        line
        for line in (replica_runs / "2/batch_norm.txt").read_text().splitlines()
        if "batch normalization" in line
    ]
    assert all(
        text in line for text in ("batch_norm", "2 replicas", "4 views", "8 views", "--sync_batch_norm")
    )
    for path in ("1/batch_norm", "2/sync_batch_norm", "2/group_norm"):
        assert "batch normalization" not in (replica_runs / f"{path}.txt").read_text()


@pytest.mark.slow
def test_dropout_depends_on_the_number_of_replicas_which_is_reported(replica_runs: Path):
    alone, shared = (losses_of(replica_runs / name) for name in ("1/dropout", "2/dropout"))
    assert np.isfinite(shared).all()
    assert np.abs(np.divide(shared, alone) - 1).max() > 1e-3
    assert "dropout" not in (replica_runs / "1/dropout.txt").read_text()
    assert "2 replicas draws its own" in (replica_runs / "2/dropout.txt").read_text()
