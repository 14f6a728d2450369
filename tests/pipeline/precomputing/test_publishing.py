"""pipeline.precomputing.publishing: when shards become visible to readers, and only with verified files."""

from __future__ import annotations

import dataclasses
import json
import threading
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import DataError, TryAgainError, UserError
from pipeline.flags.precompute import announce_demo, make_parser
from pipeline.precompute import main
from pipeline.precomputing.options import PrecomputeOptions, resolve
from pipeline.precomputing.publishing import Publisher, publish_results
from pipeline.precomputing.shard_tasks import missing_shards
from pipeline.precomputing.store_session import StoreSession, open_session
from pipeline.precomputing.worker import ShardResult, ShardWorker
from pipeline.storage.bucket import BucketDirectory
from pipeline.store.metadata import load_manifest, published_lengths
from pipeline.store.reader import StoreReader
from pipeline.store.shards import ShardTask
from pipeline.store.spec import Spec
from tests.buckets import Fault, FaultyLink, point_at
from tests.stores import Asked, assert_same_store, job_for


def results_of(store: Path, *numbers: int, split: str = "views") -> list[ShardResult]:
    directory = store if split == "views" else store / "eval"
    spec = Spec.load(store)
    shards = load_manifest(directory, digest=spec.digest())[split].shards
    starts = np.cumsum([0, *(shard.records for shard in shards)])
    return [
        ShardResult(
            task=ShardTask(split=split, number=n, first=int(starts[n]), records=shards[n].records),
            info=shards[n],
            adopted=False,
        )
        for n in numbers
    ]


def unpublish(store: Path, *lengths: int) -> None:
    """Reduces the published metadata to shards of these lengths."""
    if not lengths:
        (store / "dataset_info.json").unlink()
        return
    info = json.loads((store / "dataset_info.json").read_text())
    info["splits"][0]["shardLengths"] = [str(n) for n in lengths]
    (store / "dataset_info.json").write_text(json.dumps(info))


def test_results_are_published_in_order(store: Path) -> None:
    spec, results = Spec.load(store), results_of(store, 2, 0, 1)
    unpublish(store)
    publish_results(store, spec, results=results, identities={"views": spec.dataset})
    assert published_lengths(store) == {"views": [20, 20, 11]}
    StoreReader(store).views.read(np.arange(51))


def test_publishing_twice_is_publishing_once(store: Path) -> None:
    """A runner may repeat a step that has succeeded."""
    spec = Spec.load(store)
    results = [*results_of(store, 0, 1, 2), *results_of(store, 0, split="test")]
    identities = {
        "views": spec.dataset,
        "test": load_manifest(store / "eval", digest=spec.digest())["test"].dataset,
    }
    before = {name: (store / name).read_bytes() for name in ("dataset_info.json", "eval/dataset_info.json")}
    publish_results(store, spec, results=results, identities=identities)
    assert {name: (store / name).read_bytes() for name in before} == before


def test_a_gap_is_never_published(store: Path) -> None:
    spec, results = Spec.load(store), results_of(store, 2)
    unpublish(store, 20)
    with pytest.raises(DataError, match=r"views.array_record-00002: .* 1 "):
        publish_results(store, spec, results=results, identities={"views": spec.dataset})
    assert published_lengths(store) == {"views": [20]}


def test_a_published_shard_is_never_another(store: Path) -> None:
    spec, (result,) = Spec.load(store), results_of(store, 1)
    other = dataclasses.replace(result, info=dataclasses.replace(result.info, sha256="0" * 64))
    before = (store / "manifest.json").read_bytes()
    with pytest.raises(DataError, match=f"views.array_record-00001: .*{result.info.sha256[:16]}.*{'0' * 16}"):
        publish_results(store, spec, results=[other], identities={"views": spec.dataset})
    assert (store / "manifest.json").read_bytes() == before


@pytest.fixture
def worker(spec: Spec, data_dir: Path, teacher_path: Path, asked: Asked) -> ShardWorker:
    return ShardWorker(job_for(asked.store, spec, data_dir, teacher_path))


def options_of(asked: Asked) -> PrecomputeOptions:
    flags, _ = make_parser().parse_known_args(asked.flags())
    return resolve(flags, is_demo=announce_demo(flags))


class Session:
    """A precompute without Beam; the test decides when shards are computed and published."""

    def __init__(self, session: StoreSession, options: PrecomputeOptions, worker: ShardWorker) -> None:
        session.write_spec(options.spec)
        self.tasks, identities = missing_shards(options, session.path)
        self._job = dataclasses.replace(worker.job, store=session.location, lease=session.lease)
        self._worker = worker
        self.publisher = Publisher(session, options.spec, self.tasks, identities, fail=self._fail)

    def _fail(self, error: BaseException) -> None:
        raise error

    def compute(self, task: ShardTask) -> None:
        self._worker.job = self._job
        self._worker.run(task)


def epochs_of(location: str) -> int:
    """Number of epochs that readers see."""
    try:
        return StoreReader(location).epochs
    except UserError:
        return 0


@pytest.mark.parametrize("remote", [False, True], ids=["disk", "bucket"])
def test_epochs_are_published_as_they_are_completed(
    asked: Asked, worker: ShardWorker, published_store: Path, s3: str, remote: bool
) -> None:
    """Evaluation splits first, then a growing prefix of the views; the same bytes at the end."""
    location = s3 if remote else str(asked.store)
    asked.store.mkdir()
    seen = []
    with open_session(location) as held:
        session = Session(held, options_of(asked), worker)
        test, first, second, third = session.tasks
        for task in (second, first, test, third):  # shards of 20, 20 and 11 views; an epoch has 17
            session.compute(task)
            session.publisher.publish()
            seen.append(epochs_of(location))
            if task == test:
                assert published_lengths(held.path) == {"views": [20, 20]}
                assert StoreReader(location).eval_splits == ["test"]
                StoreReader(location).views.read(np.arange(34))
        assert seen == [0, 0, 2, 3]
        if not remote:
            held.remove_leftovers()
            assert_same_store(asked.store, published_store)
    if remote:
        bucket = BucketDirectory(s3)
        for name in ("manifest.json", "dataset_info.json", "eval/manifest.json", "views.array_record-00001"):
            assert bucket.read(name, limit=1 << 20) == (published_store / name).read_bytes()


def test_a_file_that_is_not_the_noted_one_is_not_published(
    asked: Asked, worker: ShardWorker, published_store: Path
) -> None:
    """The file has the noted size. The same command computes the shard again."""
    asked.store.mkdir()
    path = asked.store / "views.array_record-00001"
    with open_session(str(asked.store)) as held:
        session = Session(held, options_of(asked), worker)
        for task in session.tasks:
            session.compute(task)
        content = path.read_bytes()
        path.write_bytes(content[:-1] + b"\1")
        with pytest.raises(TryAgainError, match="00001: sha256"):
            session.publisher.publish()
        assert epochs_of(str(asked.store)) == 0
    assert main(asked.flags()) == 0
    assert_same_store(asked.store, published_store)


@pytest.mark.parametrize("remote", [False, True], ids=["disk", "bucket"])
def test_finished_shards_of_an_interrupted_run_are_adopted(
    asked: Asked,
    worker: ShardWorker,
    s3: str,
    s3_port: int,
    remote: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Finished shards are neither downloaded nor counted as needed space."""
    location = s3 if remote else str(asked.store)
    if not remote:
        asked.store.mkdir()
    with open_session(location) as held:
        session = Session(held, options_of(asked), worker)
        for number in (0, 1, 3):
            session.compute(session.tasks[number])
        BucketDirectory(location).write("views.array_record-00001", b"of another cut") if remote else (
            asked.store / "views.array_record-00001"
        ).write_bytes(b"of another cut")
    needed = []
    monkeypatch.setattr("pipeline.precomputing.preflight.check_space", lambda tasks, _: needed.extend(tasks))
    flags = [flag for flag in asked.flags() if not flag.startswith("--store=")]
    with FaultyLink(s3_port, lambda m, p, n: Fault()) as link:
        point_at(link.port, monkeypatch)
        assert main([*flags, f"--store={location}"]) == 0
        assert not [p for m, p in link.requests if m == "GET" and p.endswith("views.array_record-00000")]
    assert [task.name for task in needed] == ["views.array_record-00001"]
    out = capsys.readouterr().out
    assert "3 finished shards" in out
    assert "(31 views and evaluation crops of test (7))" in out
    assert "20 views, in 1 shard;" in out
    assert epochs_of(location) == 3


def test_an_error_of_publishing_ends_the_command(
    asked: Asked, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Immediately and with its own message, before all shards are computed."""

    def refuse(self: Publisher) -> None:
        raise DataError("cannot be published")

    monkeypatch.setattr(Publisher, "publish", refuse)
    with pytest.raises(DataError, match="cannot be published"):
        main(asked.flags("--epochs=30000", "--views_per_shard=100000"))


def test_readers_use_the_first_epochs_while_the_rest_is_computed(asked: Asked) -> None:
    """The command on Beam: the published part grows, and each state of it verifies."""
    seen: list[int] = []
    ended = threading.Event()

    def read() -> None:
        while not ended.wait(0.05):
            if (epochs := epochs_of(str(asked.store))) > (seen[-1] if seen else 0):
                store = StoreReader(asked.store)
                store.check_files()
                store.views.read(np.arange(store.views.num_records))
                seen.append(epochs)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        flags = asked.flags("--epochs=300", "--views_per_shard=400", "--teacher_batch_size=16")
        assert main(flags) == 0
    finally:
        ended.set()
        reader.join()
    assert seen == sorted(seen)
    assert seen[0] < 300  # a fast machine finishes before the next state is seen
    assert epochs_of(str(asked.store)) == 300
