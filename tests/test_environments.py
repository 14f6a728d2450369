"""Stores and runs cross between the environments of docs/design.md, "Platforms", with equal bytes and equal losses.

The environments are the directories in VIEW_DISTILL_VENVS, separated by colons; by default those of `make install`. A test of one
that is not installed is skipped. Each command is a process of its environment's Python.

Bytes and losses are bit-equal on the machines where this was tried (docs/guarantees.md). Another processor may round otherwise from one
TensorFlow to the next; VIEW_DISTILL_TOLERANCE is a relative difference of logits and losses that is accepted. All else is exact.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from pipeline.store.reader import StoreReader
from tests.campaigns.exact_resume import differences
from tests.runs import ROOT, environment, metrics
from tests.stores import assert_same_store

VENVS = os.environ.get("VIEW_DISTILL_VENVS", ".venv:.venv-tf221:.venv-tpu").split(":")
WRITERS = [
    venv for venv in VENVS if any((ROOT / venv).glob("lib/python*/site-packages/apache_beam"))
]  # they have Beam
GOLDEN = ROOT / "tests" / "golden"
TOLERANCE = float(os.environ.get("VIEW_DISTILL_TOLERANCE", "0"))
SAVED = 5
PRECOMPUTE = ("--runner=FnApiRunner", "--dataset=golden_images", f"--teacher={GOLDEN / 'teacher'}")
PRECOMPUTE += ("--image_size=24", "--teacher_batch_size=4", "--views_per_shard=14", "--epochs=5")
PRECOMPUTE += ("--codec=float32", "--temperature=2", "--eval_splits=test")
TRAIN = ("--student=tiny", "--batch_size=5", "--steps=10", "--warmup_steps=2", "--learning_rate=0.01")
TRAIN += ("--weight_decay=0.1", "--deterministic", "--log_every=1", "--eval_every=5")
TRAIN += (f"--checkpoint_every={SAVED}",)
# Verifies the store in argv[1], prints a digest of its batches, and trains with the other arguments. `tests` chooses Keras 2.
USE = """
import hashlib, sys, tests
from pipeline import open_store, verify
from trainer import train
store = sys.argv[1]
verify.main([f"--store={store}", "--fraction=1"])
digest = hashlib.sha256()
for views, logits in open_store(store).as_numpy(batch_size=5):
    digest.update(views.tobytes())
print("batches:", digest.hexdigest())
train.main(sys.argv[2:])
"""
# A kill right after a checkpoint.
KILLED = f"""
import os, sys, tests
from trainer.run.checkpoints import Checkpoints
from trainer.train import main
save = Checkpoints.save
def save_and_die(self, step):
    save(self, step)
    if step == {SAVED}:
        os._exit(9)
Checkpoints.save = save_and_die
main(sys.argv[1:])
"""

pytestmark = pytest.mark.slow


def run(venv: str, *argv: str, code: int = 0) -> str:
    """Runs the Python of an environment in this project; returns its output."""
    python = ROOT / venv / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{venv} is not installed: `make install` with its ENVIRONMENT")
    # Without a TPU, libtpu asks for its place for minutes.
    variables = {**environment(), "TPU_SKIP_MDS_QUERY": "1"}
    done = subprocess.run(
        [str(python), *argv], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == code, f"{venv}: {done.stderr[-2000:]}"
    return done.stdout


class Crossing:
    """Stores and runs in one directory, each made once.

    Attributes:
      root: The directory.
      data_dir: TFDS data directory, prepared by the first environment.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.data_dir = root, root / "data"
        self._digests: dict[Path, str] = {}
        folder, data = f"--folder={GOLDEN / 'images'}", f"--data_dir={self.data_dir}"
        run(WRITERS[0], "-m", "pipeline.dataset", "import", folder, "--name=golden_images", data)

    def store(self, writer: str) -> Path:
        """The store that an environment writes."""
        path = self.root / "stores" / Path(writer).name
        if not path.exists():
            flags = (*PRECOMPUTE, f"--data_dir={self.data_dir}", f"--store={path}")
            run(writer, "-m", "pipeline.precompute", *flags)
        return path

    def flags(self, writer: str, workdir: Path) -> list[str]:
        """Flags of a run on the store of `writer`."""
        return [f"--store={self.store(writer)}", f"--workdir={workdir}", *TRAIN]

    def used(self, reader: str, writer: str = WRITERS[0]) -> tuple[Path, str]:
        """Work directory of an undisturbed run after a replay, and the digest of the replay."""
        workdir = self.root / "runs" / f"{Path(reader).name} on {Path(writer).name}"
        if workdir not in self._digests:
            output = run(reader, "-c", USE, str(self.store(writer)), *self.flags(writer, workdir))
            (line,) = (line for line in output.splitlines() if line.startswith("batches:"))
            self._digests[workdir] = line
        return workdir, self._digests[workdir]

    def killed(self, begun: str) -> Path:
        """Work directory of a run that was killed after its first checkpoint."""
        workdir = self.root / "runs" / f"{Path(begun).name} killed"
        if not workdir.exists():
            run(begun, "-c", KILLED, *self.flags(WRITERS[0], workdir), code=9)
        return workdir

    def continued(self, begun: str, ended: str) -> Path:
        """Work directory of a run that an environment begins and another one ends."""
        workdir = self.root / "runs" / f"{Path(begun).name} then {Path(ended).name}"
        shutil.copytree(self.killed(begun), workdir)
        run(ended, "-m", "trainer.train", *self.flags(WRITERS[0], workdir))
        return workdir


def assert_same_records(ours: Path, theirs: Path) -> None:
    """Asserts that stores have equal specs, and equal records in all splits; logits up to the tolerance."""
    pair = StoreReader(ours), StoreReader(theirs)
    assert pair[0].spec.digest() == pair[1].spec.digest()
    for readers in zip(*(store.readers() for store in pair), strict=True):
        got, expected = (reader.read(np.arange(reader.num_records)) for reader in readers)
        for field in dataclasses.fields(expected):
            tolerance = TOLERANCE if field.name == "logits" else 0
            columns = (getattr(records, field.name) for records in (got, expected))
            np.testing.assert_allclose(*columns, rtol=tolerance, atol=tolerance, err_msg=field.name)


def assert_same_metrics(ours: Path, theirs: Path) -> None:
    """Asserts that runs trained on the same views, with equal losses up to the tolerance."""
    got, expected = metrics(ours), metrics(theirs)
    assert len(got) == len(expected) > 10
    for line, other in zip(got, expected, strict=True):
        for rates in (line, other):  # a process that continues has no rate at its first step
            rates.pop("views_per_second", None)
        assert line.keys() == other.keys()
        for name, value in other.items():
            close = pytest.approx(value, rel=TOLERANCE, abs=0) if isinstance(value, float) else value
            assert line[name] == close, name


@pytest.fixture(scope="module")
def crossing(tmp_path_factory: pytest.TempPathFactory) -> Crossing:
    if not WRITERS:
        pytest.skip("no environment of `make install` has Beam, which writes stores")
    return Crossing(tmp_path_factory.mktemp("crossing"))


@pytest.mark.parametrize("writer", WRITERS[1:])
def test_environments_write_equal_stores(writer: str, crossing: Crossing) -> None:
    ours, theirs = crossing.store(writer), crossing.store(WRITERS[0])
    assert_same_records(ours, theirs)
    if not TOLERANCE:
        assert_same_store(ours, theirs)


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("reader", VENVS)
def test_stores_are_verified_replayed_and_trained_on_everywhere(
    reader: str, writer: str, crossing: Crossing
) -> None:
    workdir, digest = crossing.used(reader, writer)
    expected_workdir, expected_digest = crossing.used(WRITERS[0])
    assert digest == expected_digest
    assert_same_metrics(workdir, expected_workdir)


@pytest.mark.parametrize(("begun", "ended"), list(itertools.permutations(VENVS, 2)))
def test_runs_continue_in_another_environment(begun: str, ended: str, crossing: Crossing) -> None:
    workdir, expected = crossing.continued(begun, ended), crossing.used(WRITERS[0])[0]
    assert_same_metrics(workdir, expected)
    if not TOLERANCE:
        assert differences(workdir, expected) == []
