"""`precompute --repair`: a lost published shard is computed again with the same bytes, or refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import DataError, UserError
from pipeline.errors.causes import find_error
from pipeline.precompute import main
from pipeline.precomputing.shard_tasks import damaged_shards
from pipeline.precomputing.worker import ShardWorker
from pipeline.storage.lock import writer_lock
from pipeline.store.metadata import MANIFEST_FILE
from pipeline.store.reader import StoreReader
from pipeline.store.shards import ShardTask
from tests.stores import Asked, job_for, shard_files

METADATA = ("manifest.json", "dataset_info.json", "features.json", "spec.json", "eval/manifest.json")


@pytest.fixture
def repair(asked: Asked, store: Path) -> Asked:
    """Flags for a copy of the published store."""
    return dataclasses.replace(asked, store=store)


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def metadata(store: Path) -> dict[str, bytes]:
    return {name: (store / name).read_bytes() for name in METADATA}


def test_damaged_shards_are_found_and_described(store: Path) -> None:
    assert damaged_shards(StoreReader(store)) == []
    shards = StoreReader(store).views.manifest.shards
    (store / "views.array_record-00000").unlink()
    flip_a_byte(store / "views.array_record-00001")
    (store / "eval/test.array_record-00000").write_bytes(b"cut")
    found = damaged_shards(StoreReader(store))
    assert [task for task, _ in found[:2]] == [
        ShardTask(split="views", number=0, first=0, records=20, sha256=shards[0].sha256),
        ShardTask(split="views", number=1, first=20, records=20, sha256=shards[1].sha256),
    ]
    assert [(task.split, task.first, task.records) for task, _ in found[2:]] == [("test", 0, 7)]
    for (_, what), reason in zip(found, ("00000", "sha256", "3 bytes"), strict=True):
        assert reason in what


def test_repaired_shards_have_the_same_bytes(
    repair: Asked, published_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One missing, one with a flipped byte, one truncated; then one missing while the store is extended."""
    before = metadata(repair.store)
    (repair.store / "views.array_record-00002").unlink()
    flip_a_byte(repair.store / "views.array_record-00000")
    (repair.store / "eval/test.array_record-00000").write_bytes(b"")
    whole = (repair.store / "views.array_record-00001").stat().st_mtime_ns
    assert main(repair.flags("--repair")) == 0
    out = capsys.readouterr().out
    assert out.count("to be computed again: ") == 3
    assert "views.array_record-00002" in out
    assert "31 views and evaluation crops of test (7), in 3 shards" in out
    assert shard_files(repair.store) == shard_files(published_store)
    assert metadata(repair.store) == before
    assert (repair.store / "views.array_record-00001").stat().st_mtime_ns == whole
    assert not (repair.store / "pending").exists()
    assert not list(repair.store.rglob(".tmp-*"))
    # Again, and nothing is to be done.
    assert main(repair.flags("--repair")) == 0
    assert "nothing to repair" in capsys.readouterr().out
    # Lost again, and the store grows in the same run.
    (repair.store / "views.array_record-00001").unlink()
    assert main(repair.flags("--repair", "--epochs=4")) == 0
    assert shard_files(published_store).items() <= shard_files(repair.store).items()
    assert StoreReader(repair.store).epochs == 4
    assert damaged_shards(StoreReader(repair.store)) == []


def test_without_repair_a_lost_shard_is_refused(repair: Asked) -> None:
    path = repair.store / "views.array_record-00001"
    path.unlink()
    with pytest.raises(DataError, match=r"00001: .*--repair"):
        main(repair.flags())
    assert not path.exists()


def test_a_repaired_shard_with_other_bytes_is_refused(repair: Asked) -> None:
    """The manifest has another checksum, as from another processor."""
    path, manifest = repair.store / "views.array_record-00001", repair.store / MANIFEST_FILE
    path.write_bytes(b"half a file")
    content = json.loads(manifest.read_text())
    content["splits"]["views"]["shards"][1]["sha256"] = "5" * 64
    manifest.write_text(json.dumps(content))
    with pytest.raises(Exception, match=path.name) as caught:
        main(repair.flags("--repair"))
    found = find_error(caught.value)
    assert isinstance(found, DataError)
    assert str(path) in str(found)
    assert "5" * 16 in str(found)
    assert path.read_bytes() == b"half a file"
    assert not list(repair.store.glob(".tmp-*"))


def test_an_interrupted_repair_changes_nothing(
    repair: Asked, data_dir: Path, teacher_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard gets its name only when it is verified."""
    path = repair.store / "views.array_record-00000"
    path.write_bytes(b"damaged")
    ((task, _),) = damaged_shards(StoreReader(repair.store))
    worker = ShardWorker(job_for(repair.store, StoreReader(repair.store).spec, data_dir, teacher_path))

    def die(*args: Any, **names: Any) -> np.ndarray:
        assert path.read_bytes() == b"damaged"
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(worker, "run_teacher", die)
        with pytest.raises(KeyboardInterrupt):
            worker.run(task)
    assert path.read_bytes() == b"damaged"
    result = worker.run(task)
    assert not result.adopted
    assert damaged_shards(StoreReader(repair.store)) == []


def test_a_repair_holds_the_stores_lock(repair: Asked) -> None:
    (repair.store / "views.array_record-00000").unlink()
    with writer_lock(repair.store), pytest.raises(UserError, match=str(repair.store)):
        main(repair.flags("--repair"))
    assert not (repair.store / "views.array_record-00000").exists()


def test_there_is_nothing_to_repair_in_a_new_store(asked: Asked) -> None:
    assert main(asked.flags("--repair", "--epochs=1")) == 0
    assert StoreReader(asked.store).epochs == 1
