"""pipeline.precomputing.store_session: pre-flight checks, locking, and leftovers of dead runs."""

from __future__ import annotations

import dataclasses
import gc
import json
import re
from pathlib import Path

import pytest

from pipeline.errors import DataError, TryAgainError, UserError
from pipeline.flags.precompute import announce_demo, make_parser
from pipeline.precompute import main
from pipeline.precomputing.options import resolve
from pipeline.precomputing.shard_sink import open_sink
from pipeline.precomputing.store_session import check_space, open_session, prepare_directory, recorded_classes
from pipeline.storage.bucket import BucketDirectory
from pipeline.storage.lock import LOCK_FILE
from pipeline.store.classes import Classes
from pipeline.store.layout import ACCURACY_FILE
from pipeline.store.reader import StoreReader
from pipeline.store.shards import ShardTask
from pipeline.store.spec import SPEC_FILE, Spec
from tests.buckets import BUCKET, put_object, upload_tree
from tests.stores import Asked, assert_same_store


def test_a_foreign_directory_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(UserError, match=re.escape("photo.jpg")):
        prepare_directory(str(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["photo.jpg"]


@pytest.mark.parametrize("name", [".git", ".bashrc", ".tmp-other", ".old-store"])
def test_a_directory_with_hidden_files_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / ".lock").touch()
    with pytest.raises(UserError, match=re.escape(name)):
        prepare_directory(str(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([".lock", name])


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "store").touch()
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "store"))):
        prepare_directory(str(tmp_path / "store"))


def test_the_directory_of_a_run_that_died_before_its_spec_is_used(tmp_path: Path, spec: Spec) -> None:
    (tmp_path / ".lock").write_text("{}")
    (tmp_path / ".tmp-spec.json-1-ab").write_text("{")
    prepare_directory(str(tmp_path))
    with open_session(str(tmp_path)) as session:
        session.check(spec)
        session.write_spec(spec)
    assert Spec.load(tmp_path) == spec
    assert not list(tmp_path.glob(".tmp-*"))


@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_new_classes_remove_the_accuracy_of_the_old_ones(
    store: Path, spec: Spec, s3: str, s3_port: int, place: str
) -> None:
    (store / ACCURACY_FILE).write_text(json.dumps({"spec": spec.digest(), "splits": {}}))
    location = str(store)
    if place == "bucket":
        location = s3
        upload_tree(s3_port, store, s3.removeprefix(f"s3://{BUCKET}/"))
    names = tuple("abcde")
    for classes, kept in (
        (Classes(), True),
        (Classes(names=names), False),
        (Classes(label_feature="none"), False),
    ):
        with open_session(location) as session:
            session.write_classes(classes, spec)
        opened = StoreReader(location)
        assert opened.classes == recorded_classes(location) == classes
        assert (opened.path / ACCURACY_FILE).exists() == kept


def test_recorded_classes_of_a_bucket_are_read_before_their_copy_is_removed(
    store: Path, spec: Spec, s3: str, s3_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy is removed with its object, which exceptions of fsspec may keep until the next garbage collection."""
    upload_tree(s3_port, store, s3.removeprefix(f"s3://{BUCKET}/"))
    classes = Classes(names=tuple("abcde"))
    with open_session(s3) as session:
        session.write_classes(classes, spec)
    exists = Path.exists

    def exists_after_collection(path: Path) -> bool:
        gc.collect()
        return exists(path)

    monkeypatch.setattr(Path, "exists", exists_after_collection)
    assert recorded_classes(s3) == classes


@pytest.mark.parametrize("below", ["", "eval"])
def test_notes_on_published_shards_are_removed(store: Path, spec: Spec, below: str) -> None:
    """A run was killed between publishing and its last step."""
    pending = store / below / "pending"
    split, last = ("test", 0) if below else ("views", 2)
    pending.mkdir()
    left = [f"{split}.array_record-{last + 1:05d}.json", "other.array_record-00000.json"]
    for name in (f"{split}.array_record-{last:05d}.json", f"{split}.array_record-{last:05d}.progress", *left):
        (pending / name).touch()
    with open_session(str(store)) as session:
        session.check(spec)
    assert sorted(path.name for path in pending.iterdir()) == sorted(left)
    for name in left:
        (pending / name).unlink()
    (pending / ".tmp-views.array_record-00003.json-1-ab").touch()
    with open_session(str(store)) as session:
        session.check(spec)
    assert not pending.exists()


def test_a_store_of_another_spec_is_refused_with_both_sides(store: Path, spec: Spec) -> None:
    other = dataclasses.replace(spec, seed=9, codec="float32")
    before = (store / SPEC_FILE).read_bytes()
    with pytest.raises(DataError) as caught, open_session(str(store)) as session:
        session.check(other)
    for part in ("codec: float32 ", "float16", "seed: 9 ", str(store)):
        assert part in str(caught.value)
    assert (store / SPEC_FILE).read_bytes() == before


def test_the_spec_of_another_run_in_a_bucket_is_not_replaced(s3: str, spec: Spec) -> None:
    """It took the store over while this run tried the teacher."""
    bucket = BucketDirectory(s3)
    with open_session(s3) as session:
        bucket.write(SPEC_FILE, b"another")
        with pytest.raises(TryAgainError, match=SPEC_FILE):
            session.write_spec(spec)
        assert bucket.read(SPEC_FILE, limit=1 << 20) == b"another"
        bucket.write(SPEC_FILE, spec.to_json().encode())  # by an attempt whose answer was lost
        session.write_spec(spec)
    assert Spec.load(session.path) == spec


def test_a_directory_placeholder_in_a_bucket_is_empty(s3: str, s3_port: int) -> None:
    put_object(s3_port, f"{s3.removeprefix(f's3://{BUCKET}/')}/", b"")
    prepare_directory(s3)


def test_a_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"`store`=.*/file/below/store"):
        prepare_directory(str(tmp_path / "file" / "below" / "store"))


def test_a_run_that_no_disk_can_hold_is_refused_with_both_sizes(asked: Asked) -> None:
    asked.store.mkdir()
    flags, _ = make_parser().parse_known_args(asked.flags())
    options = resolve(flags, is_demo=announce_demo(flags))
    task = ShardTask(split="views", number=0, first=0, records=1000)
    check_space([task], options)
    with pytest.raises(UserError, match=r"34,000,000\.\d MB.* [\d,]+\.\d MB"):
        check_space([dataclasses.replace(task, records=10**12)], options)


def test_a_published_shard_is_never_removed_as_a_leftover(store: Path, spec: Spec) -> None:
    sink = open_sink(str(store), spec, lease=None)
    with open_session(str(store)) as session:
        for split, number in (("views", 2), ("test", 0)):
            task = ShardTask(split=split, number=number, first=0, records=3)
            with pytest.raises(ValueError, match=task.name):
                session.adopt_finished([task], sink)
            assert (store / ("eval" if split == "test" else "") / task.name).exists()


def test_evaluation_shards_are_checked_before_the_first_epoch_is_published(
    store: Path, spec: Spec, asked: Asked, published_store: Path
) -> None:
    """An interrupted run has published only the evaluation splits."""
    for path in [*store.glob("views.*"), *(store / name for name in ("manifest.json", "dataset_info.json"))]:
        path.unlink()
    shard = store / "eval/test.array_record-00000"
    shard.write_bytes(b"cut")
    with pytest.raises(DataError) as caught, open_session(str(store)) as session:
        session.check(spec)
    assert str(shard) in str(caught.value)
    flags = dataclasses.replace(asked, store=store).flags("--repair")
    assert main(flags) == 0
    assert_same_store(store, published_store)


def test_a_lost_lock_is_noticed(s3: str) -> None:
    with open_session(s3) as session:
        session.check_lock()
        BucketDirectory(s3).write(LOCK_FILE, b'{"lease": "another"}')
        with pytest.raises(TryAgainError):
            session.check_lock()
