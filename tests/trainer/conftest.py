"""Stores for training runs, made once per session, and a data set that differs only in its pixels."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tensorflow as tf
from tensorflow.python.framework.config import disable_op_determinism

from pipeline.precomputing.worker import ShardWorker
from pipeline.store.spec import Spec
from tests import bit, stores, teachers
from tests.fake_cloud import CLOUD, Cloud
from tests.launches import DATA, STORE, TRAINER, run_check_here
from trainer import models
from trainer.cloud import preflight
from trainer.config import choices
from trainer.models.bit import BIT_MODELS

MakeStore = Callable[..., Path]
Precompute = Callable[..., Path]


@pytest.fixture(scope="session")
def make_store(
    tmp_path_factory: pytest.TempPathFactory, spec: Spec, data_dir: Path, teacher_path: Path
) -> MakeStore:
    """Returns a function that writes a store of `train` without teacher outputs for evaluation splits."""

    def make(name: str, *, epochs: int, views_per_shard: int = 20, **changes: object) -> Path:
        store = tmp_path_factory.mktemp(name) / "store"
        changed = dataclasses.replace(spec, **changes)
        worker = ShardWorker(stores.job_for(store, changed, data_dir, teacher_path))
        stores.write_store(worker, epochs=epochs, views_per_shard=views_per_shard, eval_splits=())
        return store

    return make


@pytest.fixture(scope="session")
def three_epochs(make_store: MakeStore) -> Path:
    """A store with 51 views and the spec of `published_store`; read-only."""
    return make_store("three_epochs", epochs=3)


@pytest.fixture(scope="session")
def one_epoch(make_store: MakeStore) -> Path:
    """A store with the first 17 of those views; read-only."""
    return make_store("one_epoch", epochs=1)


@pytest.fixture(scope="session")
def float32_store(make_store: MakeStore) -> Path:
    """A store with 51 views and float32 logits; read-only."""
    return make_store("float32", epochs=3, codec="float32")


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Enables deterministic ops for one test."""
    tf.config.experimental.enable_op_determinism()
    yield
    disable_op_determinism()


@pytest.fixture(scope="session")
def colors_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set that can be learned in a few steps, because each class is a color; read-only."""
    return teachers.prepare_colors(tmp_path_factory.mktemp("colors"))


@pytest.fixture(scope="session")
def npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An .npz file of a small BiT with 7 classes, in the format of the paper; read-only."""
    arrays = bit.paper_names(bit.random_arrays(bit.shapes_of(bit.UNITS)))
    return bit.save_npz(tmp_path_factory.mktemp("npz") / "bit.npz", arrays)


@pytest.fixture
def bit_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registers a BiT with two small blocks under the name `bit_small`."""
    for name, table in (("BIT_MODELS", BIT_MODELS), ("STUDENTS", models.STUDENTS)):
        monkeypatch.setitem(table, "bit_small", functools.partial(models.bit.bit, depth=bit.UNITS))
        monkeypatch.setattr(choices, name, tuple(table))


@pytest.fixture
def grown(one_epoch: Path, tmp_path: Path) -> Path:
    """A writable copy of the store with one epoch."""
    return Path(shutil.copytree(one_epoch, tmp_path / "store"))


@pytest.fixture(scope="module")
def precompute(
    one_epoch: Path, spec: Spec, data_dir: Path, teacher_path: Path, tmp_path_factory
) -> Precompute:
    """Returns a function that extends a copy of that store with the precompute's worker, to each number of epochs in turn."""

    def grow(*epochs: int, views_per_shard: int) -> Path:
        store = Path(shutil.copytree(one_epoch, tmp_path_factory.mktemp("precomputed") / "store"))
        worker = ShardWorker(stores.job_for(store, spec, data_dir, teacher_path))
        for count in epochs:
            stores.write_store(worker, epochs=count, views_per_shard=views_per_shard, eval_splits=())
        return store

    return grow


@pytest.fixture
def cloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, published_store: Path) -> Iterator[Cloud]:
    """The fake cloud in front of gcloud, with a store and data in its bucket.

    The trainer's flags are resolved in this process, which has TensorFlow; `test_launch_whole` starts the real one.
    """
    monkeypatch.setattr(preflight, "run_check", run_check_here)
    made = Cloud(tmp_path / "cloud").build()
    monkeypatch.setenv(CLOUD, str(made.root))
    monkeypatch.setenv("PATH", f"{made.root / 'bin'}:/usr/bin:/bin")
    trainer = made.root / "bin" / "python"
    trainer.write_text(TRAINER)
    trainer.chmod(0o755)
    shutil.copytree(published_store, made.bucket(STORE))
    made.bucket(DATA).mkdir()
    (made.bucket(DATA) / "small_photos").mkdir()
    yield made
    made.end_machine(state=None)
