"""A small data set of mixed image kinds, two teachers and a published store, made once per session."""

from __future__ import annotations

import gc
import importlib.abc
import importlib.util
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tensorflow as tf

from pipeline.precomputing.worker import ShardWorker
from pipeline.storage import retry
from pipeline.store.spec import Spec
from tests import buckets, stores


class WithoutBeam(importlib.abc.MetaPathFinder):
    """Skips a test, or a module of tests, that imports or looks for Beam where it is not installed, as in the environment for TPUs."""

    def find_spec(self, fullname: str, *others: Any) -> None:
        if fullname == "apache_beam":
            pytest.skip("needs Beam, which this environment does not have", allow_module_level=True)


def pytest_configure() -> None:
    """Adds the rule above, and restores SIGINT, which background processes of a shell and all their children ignore."""
    sys.meta_path.append(WithoutBeam())  # it is asked last, for what no other finder has
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module", autouse=True)
def forget_models() -> Iterator[None]:
    """Frees the models of a test module, which Keras and TensorFlow keep; BiT models are large."""
    yield
    tf.keras.backend.clear_session()
    gc.collect()


@pytest.fixture(scope="session")
def beam() -> None:
    """For tests that start Beam in another process."""
    importlib.util.find_spec("apache_beam")  # the rule above


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TFDS data directory with `small_photos`: `train` 17, `test` 7; read only."""
    return stores.prepare_photos(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def other_data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set with the same name, sizes and kinds, but other pixels; read only."""
    return stores.prepare_photos(tmp_path_factory.mktemp("other_data"), seed=1)


@pytest.fixture(scope="session")
def forged_data_dir(tmp_path_factory: pytest.TempPathFactory, data_dir: Path, other_data_dir: Path) -> Path:
    """Other images under the metadata of the data set that the teacher saw; read only."""
    forged = Path(shutil.copytree(other_data_dir, tmp_path_factory.mktemp("forged") / "data"))
    (info,) = data_dir.rglob("dataset_info.json")
    shutil.copy(info, forged / info.relative_to(data_dir))
    return forged


@pytest.fixture(scope="session")
def teacher_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain SavedModel; read only."""
    return stores.save_teacher(tmp_path_factory.mktemp("teacher") / "plain")


@pytest.fixture(scope="session")
def keras_teacher_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same teacher as a Keras SavedModel; read only."""
    path = tmp_path_factory.mktemp("keras_teacher") / "keras"
    stores.keras_teacher().save(path, include_optimizer=False)
    return path


@pytest.fixture(scope="session")
def spec(data_dir: Path, teacher_path: Path) -> Spec:
    return stores.make_spec(data_dir, teacher_path)


@pytest.fixture(scope="session")
def published_store(
    tmp_path_factory: pytest.TempPathFactory, spec: Spec, data_dir: Path, teacher_path: Path
) -> Path:
    """Three epochs of `train` in shards of 20 views, and `test`; read only."""
    store = tmp_path_factory.mktemp("published") / "store"
    worker = ShardWorker(stores.job_for(store, spec, data_dir, teacher_path))
    stores.write_store(worker, epochs=3)
    return store


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    """Port of a real S3 server on loopback with one bucket, in a separate process."""
    with buckets.s3_server() as port:
        yield port


@pytest.fixture
def s3(s3_port: int, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """URL of this test's own directory in the bucket of the S3 server."""
    buckets.point_at(s3_port, monkeypatch)
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.01)
    return f"s3://{buckets.BUCKET}/{abs(hash(request.node.nodeid)):x}"


@pytest.fixture(scope="session")
def gcs_server_port() -> Iterator[int]:
    """Port of an emulator of Google Cloud Storage that ignores preconditions, with one bucket."""
    with buckets.gcs_server() as port:
        yield port


@pytest.fixture(scope="session")
def gcs_port(gcs_server_port: int) -> Iterator[int]:
    """Port of a proxy of the emulator that honors preconditions."""
    with buckets.GenerationLink(gcs_server_port) as link:
        yield link.port


@pytest.fixture
def gcs(gcs_port: int, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """URL of this test's own directory in the bucket of the emulator."""
    buckets.point_at_gcs(gcs_port, monkeypatch)
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.01)
    return f"gs://{buckets.BUCKET}/{abs(hash(request.node.nodeid)):x}"


@pytest.fixture
def store(published_store: Path, tmp_path: Path) -> Path:
    """A copy of the published store, for tests that change it."""
    return Path(shutil.copytree(published_store, tmp_path / "store"))
