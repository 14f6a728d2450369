"""pipeline.verify on real stores, whole and forged."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline import verify
from pipeline.errors import DataError, UserError
from pipeline.store.metadata import load_manifest, publish_metadata
from pipeline.store.reader import Store
from pipeline.store.shards import ShardTask, serialize, write_shard
from pipeline.store.spec import Spec
from pipeline.views.records import ViewRecords
from pipeline.worker import ShardWorker
from tests import stores

VIEW = 3  # the one that is forged


def run_verify(store: Path, data_dir: Path, teacher: Path, *flags: str) -> int:
    paths = [f"--store={store}", f"--data_dir={data_dir}", f"--teacher={teacher}"]
    return verify.main([*paths, "--fraction=1", *flags])


def forge(store: Path, change: Callable[[ViewRecords], ViewRecords]) -> None:
    """Rewrites the first shard with a change, and the manifest to go with it: only the teacher can tell."""
    opened = Store(store)
    codec, digest = opened.spec.make_codec(), opened.spec.digest()
    manifest = load_manifest(store, digest=digest)
    info = manifest["views"].shards[0]
    records = change(opened.views.read(np.arange(info.records)))
    path = store / "views.array_record-00000"
    size, sha256 = write_shard(path, [serialize(records, codec.encode(records.logits))], info.records)
    shards = (
        dataclasses.replace(info, bytes=size, sha256=sha256),
        *manifest["views"].shards[1:],
    )
    splits = {"views": dataclasses.replace(manifest["views"], shards=shards)}
    publish_metadata(store, splits, digest=digest, codec=codec)


def with_column(name: str, change: Callable[[np.ndarray], None]) -> Callable[[ViewRecords], ViewRecords]:
    def apply(records: ViewRecords) -> ViewRecords:
        column = np.array(getattr(records, name))
        change(column[VIEW : VIEW + 1])
        return dataclasses.replace(records, **{name: column})

    return apply


def test_a_whole_store_passes_and_says_how_much_was_run_again(
    published_store: Path, data_dir: Path, teacher_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_verify(published_store, data_dir, teacher_path) == 0
    out = capsys.readouterr().out
    views = Store(published_store).views.num_records
    assert f"views: {views} run again, 0 with other parameters, 0 differing crops" in out
    assert "evaluation crops: 7 run again" in out


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
    cost = Store(store).views.manifest.fidelity()
    assert 0 < cost["mean_kl"] < 0.1
    assert cost["max_logit_error"] > 1e-3
    assert run_verify(store, data_dir, teacher_path) == 0
    same = f"largest logit difference 0 (0 views beyond what {codec} allows)"
    assert capsys.readouterr().out.count(same) == 2
    # As much as another machine's arithmetic may, and ten times as much.
    for share, count in ((1e-4, 0), (1e-2, 1)):
        forged = Path(shutil.copytree(store, tmp_path / f"{share}"))
        forge(
            forged,
            with_column("logits", lambda row, share=share: np.add(row, share * np.abs(row).max(), out=row)),
        )
        findings = verify.Findings()
        task = ShardTask(split="views", number=0, first=0, records=8)
        verify.compare(worker, Store(forged).views, task, findings)
        assert findings.wrong_logits == count


@pytest.fixture(scope="module")
def worker(
    tmp_path_factory: pytest.TempPathFactory, spec: Spec, data_dir: Path, teacher_path: Path
) -> ShardWorker:
    """One worker for all forgeries: it computes, and reads nothing of a store."""
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
    findings = verify.Findings()
    verify.compare(
        worker, Store(store).views, ShardTask(split="views", number=0, first=0, records=8), findings
    )
    assert findings.views == 8
    counts = {name: getattr(findings, name) for name in ("wrong_parameters", "wrong_crops", "wrong_logits")}
    assert counts == {**dict.fromkeys(counts, 0), count: 1}
    assert findings.failed


def test_a_forged_store_is_refused(
    store: Path, data_dir: Path, teacher_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forge(store, with_column("logits", lambda row: np.add(row, 0.5, out=row)))
    with pytest.raises(DataError, match="do not train on it"):
        run_verify(store, data_dir, teacher_path)
    assert "(1 views beyond what float16 allows)" in capsys.readouterr().out


def test_a_damaged_shard_is_refused_before_anything_is_run(
    store: Path, data_dir: Path, teacher_path: Path
) -> None:
    path = store / "views.array_record-00001"
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"views\.array_record-00001: sha256 is .* here, .* in the manifest"):
        run_verify(store, data_dir, teacher_path)


def test_another_teacher_is_refused_with_both_fingerprints(
    published_store: Path, data_dir: Path, keras_teacher_path: Path, spec: object
) -> None:
    with pytest.raises(DataError, match=r"fingerprint: \w{64} here, \w{64} in the spec"):
        run_verify(published_store, data_dir, keras_teacher_path)


def test_the_sample_is_seeded_and_as_large_as_asked(published_store: Path) -> None:
    reader = Store(published_store).views
    everything = verify.sample_batches(reader, batch_size=stores.BATCH, fraction=1, seed=0)
    assert sum(task.records for task in everything) == reader.num_records
    half = [verify.sample_batches(reader, batch_size=stores.BATCH, fraction=0.5, seed=s) for s in (0, 0, 1)]
    assert half[0] == half[1]
    assert half[0] != half[2]
    assert len(half[0]) == round(len(everything) / 2)
    assert len(verify.sample_batches(reader, batch_size=stores.BATCH, fraction=0, seed=0)) == 1


def test_a_fraction_outside_0_to_1_is_a_mistake(published_store: Path) -> None:
    with pytest.raises(UserError, match=r"--fraction=2\.0: expected 0 to 1"):
        verify.main([f"--store={published_store}", "--fraction=2"])
