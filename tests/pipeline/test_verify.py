"""pipeline.verify on intact and on forged stores."""

from __future__ import annotations

import collections
import dataclasses
import re
import shutil
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import verify
from pipeline.errors import DataError, UserError
from pipeline.precomputing.verification import Findings, sample_batches, verified_shards, verify_split
from pipeline.precomputing.worker import ShardWorker
from pipeline.storage.files import sha256_of
from pipeline.store.metadata import load_manifest, publish_metadata
from pipeline.store.reader import StoreReader
from pipeline.store.serialization import serialize
from pipeline.store.shards import write_shard
from pipeline.store.spec import Spec
from pipeline.views.records import ViewRecords
from tests import stores
from tests.buckets import BUCKET, Fault, FaultyLink, point_at, upload_tree

VIEW = 3  # the one that is forged


def run_verify(store: Path, data_dir: Path, teacher: Path, *flags: str) -> int:
    paths = [f"--store={store}", f"--data_dir={data_dir}", f"--teacher={teacher}"]
    return verify.main([*paths, "--fraction=1", *flags])


def forge(store: Path, change: Callable[[ViewRecords], ViewRecords]) -> None:
    """Changes the first shard and its checksum, so that only the teacher can reveal it."""
    opened = StoreReader(store)
    codec, digest = opened.spec.make_codec(), opened.spec.digest()
    manifest = load_manifest(store, digest=digest)
    info = manifest["views"].shards[0]
    records = change(opened.views.read(np.arange(info.records)))
    path = store / "views.array_record-00000"
    chunks = [serialize(records, codec.encode(records.logits))]
    size, sha256 = write_shard(path, chunks, info.records, replace=True)
    shards = (
        dataclasses.replace(info, bytes=size, sha256=sha256),
        *manifest["views"].shards[1:],
    )
    splits = {"views": dataclasses.replace(manifest["views"], shards=shards)}
    publish_metadata(store, splits, digest=digest, codec=codec)


def first_batch(worker: ShardWorker, store: Path) -> Findings:
    """Findings over the first teacher batch of a store."""
    reader = StoreReader(store).views
    samples = [np.arange(0 if number else 1) for number in range(len(reader.manifest.shards))]
    return verify_split(worker, reader, samples, lambda count: None)


def with_column(name: str, change: Callable[[np.ndarray], None]) -> Callable[[ViewRecords], ViewRecords]:
    def apply(records: ViewRecords) -> ViewRecords:
        column = np.array(getattr(records, name))
        change(column[VIEW : VIEW + 1])
        return dataclasses.replace(records, **{name: column})

    return apply


def test_an_intact_store_passes(
    published_store: Path, data_dir: Path, teacher_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_verify(published_store, data_dir, teacher_path) == 0
    out = capsys.readouterr().out
    views = StoreReader(published_store).views.num_records
    assert f"views: {views} computed again, 0 with other parameters, 0 differing crops" in out
    assert "evaluation crops: 7 computed again" in out


@pytest.mark.parametrize("codec", ["int8", "topk:3"])
def test_tolerance_follows_the_codec(
    tmp_path: Path,
    spec: Spec,
    data_dir: Path,
    teacher_path: Path,
    codec: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store = tmp_path / "store"
    spec = dataclasses.replace(spec, codec=codec)
    worker = ShardWorker(stores.job_for(store, spec, data_dir, teacher_path))
    stores.write_store(worker, epochs=1)
    cost = StoreReader(store).views.manifest.fidelity()
    assert 0 < cost["mean_kl"] < 0.1
    assert cost["max_logit_error"] > 1e-3
    assert run_verify(store, data_dir, teacher_path) == 0
    same = f"largest logit difference 0 (0 views beyond the tolerance of {codec})"
    assert capsys.readouterr().out.count(same) == 2
    # As much as another machine's arithmetic may, and ten times as much.
    for share, count in ((1e-4, 0), (1e-2, 1)):
        forged = Path(shutil.copytree(store, tmp_path / f"{share}"))
        forge(
            forged,
            with_column("logits", lambda row, share=share: np.add(row, share * np.abs(row).max(), out=row)),
        )
        assert first_batch(worker, forged).wrong_logits == count


@pytest.fixture(scope="module")
def worker(
    tmp_path_factory: pytest.TempPathFactory, spec: Spec, data_dir: Path, teacher_path: Path
) -> ShardWorker:
    """One worker for all forged stores; it does not read the store."""
    return ShardWorker(stores.job_for(tmp_path_factory.mktemp("unused"), spec, data_dir, teacher_path))


@pytest.mark.parametrize(
    ("column", "change", "count"),
    [
        ("logits", lambda row: np.add(row, 0.5, out=row), "wrong_logits"),
        ("crop_hash", lambda row: np.bitwise_xor(row, 1, out=row), "wrong_crops"),
        ("source_hash", lambda row: np.bitwise_xor(row, 1, out=row), "wrong_crops"),
        ("ratio", lambda row: np.multiply(row, 0.5, out=row), "wrong_parameters"),
        ("flip", lambda row: np.logical_not(row, out=row), "wrong_parameters"),
        ("box", lambda row: np.add(row, 1, out=row), "wrong_parameters"),
        ("example", lambda row: np.add(row, 1, out=row), "wrong_parameters"),
    ],
)
def test_a_forged_record_is_counted(
    store: Path, worker: ShardWorker, column: str, change: Callable[[np.ndarray], None], count: str
) -> None:
    forge(store, with_column(column, change))
    findings = first_batch(worker, store)
    assert findings.views == stores.BATCH
    counts = {name: getattr(findings, name) for name in ("wrong_parameters", "wrong_crops", "wrong_logits")}
    assert counts == {**dict.fromkeys(counts, 0), count: 1}
    assert findings.failed


def test_a_forged_store_is_refused(
    store: Path, data_dir: Path, teacher_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forge(store, with_column("logits", lambda row: np.add(row, 0.5, out=row)))
    with pytest.raises(DataError, match=re.escape(str(store))):
        run_verify(store, data_dir, teacher_path)
    assert "(1 views beyond the tolerance of float16)" in capsys.readouterr().out


def test_a_damaged_shard_is_refused(store: Path, data_dir: Path, teacher_path: Path) -> None:
    path = store / "views.array_record-00001"
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"views\.array_record-00001: sha256"):
        run_verify(store, data_dir, teacher_path)


def test_another_teacher_is_refused_with_both_fingerprints(
    published_store: Path, data_dir: Path, keras_teacher_path: Path, spec: object
) -> None:
    with pytest.raises(DataError, match=r"fingerprint: \w{64} .*\w{64} "):
        run_verify(published_store, data_dir, keras_teacher_path)


def sample(lengths: list[int], fraction: float, seed: int) -> list[int]:
    samples = sample_batches(lengths, batch_size=8, fraction=fraction, seed=seed)
    per_shard = list(samples)
    assert len(per_shard) == len(lengths)
    return np.concatenate(per_shard).tolist()


def test_the_sample_is_seeded_uniform_and_as_large_as_asked() -> None:
    lengths = [20, 8, 7, 100, 1]  # of 3, 1, 1, 13 and 1 batches
    everything = sample(lengths, 1, 0)
    assert everything == [0, 8, 16, 20, 28, *range(35, 135, 8), 135]
    assert sample(lengths, 0.5, 0) == sample(lengths, 0.5, 0) != sample(lengths, 0.5, 1)
    assert len(sample(lengths, 0.5, 0)) == round(len(everything) / 2)
    assert len(sample(lengths, 0, 0)) == 1
    seeds = 400
    counts = collections.Counter(start for seed in range(seeds) for start in sample(lengths, 5 / 19, seed))
    expected = seeds * 5 / 19
    assert set(counts) == set(everything)
    assert all(abs(count - expected) < 5 * expected**0.5 for count in counts.values())


def test_the_sample_of_a_large_store_is_taken_in_bounded_memory() -> None:
    """As for 14 million images and 300 epochs: 66 million batches in 64,000 shards, of which 100 are sampled here."""
    lengths = [65_536] * 64_000
    tracemalloc.start()
    samples = sample_batches(lengths, batch_size=64, fraction=0.01, seed=0)
    found = np.concatenate([next(samples) for _ in range(100)])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 800 < len(found) < 1250  # 1,024 are expected
    assert peak < 2_000_000


def test_each_shard_is_hashed_once(
    published_store: Path, data_dir: Path, teacher_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []

    def count(path: Path) -> str:
        hashed.append(path.name)
        return sha256_of(path)

    monkeypatch.setattr("pipeline.store.shards.sha256_of", count)
    assert run_verify(published_store, data_dir, teacher_path) == 0
    shards = [path.name for path in published_store.rglob("*.array_record-*")]
    assert sorted(hashed) == sorted(shards)


@pytest.mark.parametrize(("fitting", "at_once"), [(0.5, 1), (2.5, 2), (100, 4)])
def test_shards_are_read_ahead_as_far_as_there_is_room(
    published_store: Path, monkeypatch: pytest.MonkeyPatch, fitting: float, at_once: int
) -> None:
    reader = StoreReader(published_store).views
    shard = reader.manifest.shards[0]
    manifest = dataclasses.replace(reader.manifest, shards=(shard,) * 10)
    monkeypatch.setattr(reader, "manifest", manifest)
    opened = []

    def verify_first(number: int) -> Any:
        opened.append(number)
        return first(0)

    first = reader.opener.verify
    monkeypatch.setattr(reader.opener, "verify", verify_first)
    shards = verified_shards(reader, capacity=int(fitting * shard.bytes))
    next(shards)
    next(shards)
    time.sleep(0.2)
    assert len(opened) == at_once + 1
    assert len(list(shards)) == 8
    assert sorted(opened) == list(range(10))


def test_each_shard_of_a_bucket_is_downloaded_once(
    published_store: Path,
    data_dir: Path,
    teacher_path: Path,
    s3: str,
    s3_port: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    upload_tree(s3_port, published_store, s3.removeprefix(f"s3://{BUCKET}/"))
    with FaultyLink(s3_port, lambda *_: Fault()) as link:
        point_at(link.port, monkeypatch)
        assert verify.main([f"--store={s3}", f"--data_dir={data_dir}", f"--teacher={teacher_path}"]) == 0
        got = [path.rsplit("/", 1)[1] for method, path in link.requests if method == "GET"]
    shards = [path.name for path in published_store.rglob("*.array_record-*")]
    assert sorted(name for name in got if ".array_record-" in name) == sorted(shards)


def test_a_fraction_outside_0_to_1_is_a_mistake(published_store: Path) -> None:
    with pytest.raises(UserError, match="--fraction=2"):
        verify.main([f"--store={published_store}", "--fraction=2"])


def test_an_evaluation_crop_is_not_named_as_a_view(
    published_store: Path, worker: ShardWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = worker.teacher.logits

    def name_first(*args: Any, name_row: Callable[[int], str]) -> np.ndarray:
        named.append(name_row(0))
        return logits(*args, name_row=name_row)

    named: list[str] = []
    monkeypatch.setattr(worker.teacher, "logits", name_first)
    reader = StoreReader(published_store).eval_reader("test")
    verify_split(worker, reader, [np.arange(1)], lambda count: None)
    assert named == ["example 0 of test"]
