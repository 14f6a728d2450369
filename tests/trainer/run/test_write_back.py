"""trainer.run.write_back: appended shards are byte-equal to the precompute's, also after crashes."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import Interrupted
from pipeline.inputs.dataset import Dataset
from pipeline.inputs.locate import load_teacher
from pipeline.precomputing.shard_sink import RecordEncoder
from pipeline.precomputing.worker import ShardWorker
from pipeline.store.reader import StoreReader
from pipeline.store.spec import Spec
from pipeline.views.records import ViewRecords
from tests import stores
from tests.runs import (
    forge_smallest_logit,
)
from tests.stores import assert_same_store, assert_whole, published_files
from trainer.run.preemption import Preemption
from trainer.run.write_back import Appending, TeacherPass, WriteBack, check_machine
from trainer.targets.batches import Targets

N = stores.N
Precompute = Callable[..., Path]


@pytest.fixture(scope="module")
def teacher_pass(one_epoch: Path, data_dir: Path, teacher_path: Path) -> TeacherPass:
    """The teacher outside of training."""
    store = StoreReader(one_epoch)
    dataset = Dataset(stores.DATASET, "train", data_dir=data_dir)
    view_input = Targets(store, dataset, batch_size=stores.BATCH, continued_from=0).input
    return TeacherPass(view_input, load_teacher(store.spec, str(teacher_path)))


@pytest.fixture(scope="module")
def records(teacher_pass: TeacherPass) -> ViewRecords:
    """Records of 9 epochs, with the teacher's logits before the codec."""
    parts = [part for _, part in teacher_pass.records(0, 9 * N)]
    columns = [field.name for field in dataclasses.fields(ViewRecords)]
    return ViewRecords(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in columns})


def add_steps(write_back: WriteBack, records: ViewRecords, start: int, stop: int, *, batch_size: int) -> None:
    """Yields the records of a run's steps from view `start` on."""
    for first in range(start, stop, batch_size):
        last = min(first + batch_size, stop)
        write_back.add(first, records.take(np.arange(first, last)))


@pytest.mark.parametrize("batch_size", [1, 4, 5, 17, 64])
def test_bytes_do_not_depend_on_the_student_s_batches(
    grown: Path, records: ViewRecords, precompute: Precompute, batch_size: int
):
    write_back = WriteBack(
        StoreReader(grown), views_per_shard=60
    )  # three epochs per shard, not a multiple of 4
    add_steps(write_back, records, 0, 9 * N - 3, batch_size=batch_size)
    write_back.close()
    assert write_back.published_epochs == 7
    assert_same_store(grown, precompute(8, views_per_shard=3 * N))


@pytest.mark.parametrize("codec", ["int8", "topk:3"])
def test_every_codec_is_written_back(
    codec: str, spec: Spec, records: ViewRecords, data_dir: Path, teacher_path: Path, tmp_path: Path
):
    spec = dataclasses.replace(spec, codec=codec)
    grown, precomputed = tmp_path / "grown", tmp_path / "precomputed"
    for path, epochs in ((grown, (1,)), (precomputed, (1, 4))):
        worker = ShardWorker(stores.job_for(path, spec, data_dir, teacher_path))
        for count in epochs:
            stores.write_store(worker, epochs=count, views_per_shard=3 * N, eval_splits=())
    write_back = WriteBack(StoreReader(grown), views_per_shard=60)
    add_steps(write_back, records, N, 4 * N, batch_size=5)
    write_back.close()
    assert_same_store(grown, precomputed)


def test_epoch_longer_than_a_shard_is_published_with_its_last_shard(
    grown: Path, records: ViewRecords, precompute: Precompute
):
    write_back = WriteBack(StoreReader(grown), views_per_shard=8)
    add_steps(write_back, records, N, 2 * N - 1, batch_size=3)
    assert StoreReader(grown).epochs == 1
    add_steps(write_back, records, 2 * N - 1, 4 * N + 9, batch_size=3)
    write_back.close()
    assert_same_store_but_for_pending(grown, precompute(2, 3, 4, views_per_shard=8))
    # The next run adopts the finished shards of the incomplete epoch.
    again = WriteBack(StoreReader(grown), views_per_shard=8)
    assert again.next_view == 4 * N + 8
    add_steps(again, records, 4 * N + 5, 5 * N, batch_size=3)
    assert_same_store(grown, precompute(2, 3, 4, 5, views_per_shard=8))


def assert_same_store_but_for_pending(got: Path, expected: Path) -> None:
    ours, theirs = published_files(got), published_files(expected)
    assert {name: ours[name] for name in theirs} == theirs
    assert len(ours) == len(theirs) + 1


def test_gap_before_the_views_is_refused(grown: Path, records: ViewRecords):
    write_back = WriteBack(StoreReader(grown), views_per_shard=40)
    with pytest.raises(ValueError, match=r"17\.\.19"):
        write_back.add(20, records.take(np.arange(20, 25)))


class CrashError(Exception):
    """Stands for a power failure."""


@pytest.mark.parametrize("views_per_shard", [8, 40])
def test_crash_at_any_rename_leaves_whole_epochs_and_the_next_run_completes_the_store(
    one_epoch: Path,
    records: ViewRecords,
    precompute: Precompute,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    views_per_shard: int,
):
    steps = (2, 3) if views_per_shard == 8 else (3,)
    expected = precompute(*steps, views_per_shard=views_per_shard if views_per_shard == 8 else 2 * N)
    replace, crashes = Path.replace, 0
    for before in (True, False):
        for moment in range(100):
            store = Path(shutil.copytree(one_epoch, tmp_path / f"{before}_{moment}"))
            calls = iter(range(100))

            def crash(
                path: Path, target: Path, calls=calls, moment: int = moment, before: bool = before
            ) -> Path:
                now = next(calls) == moment
                if now and before:
                    raise CrashError
                out = replace(path, target)
                if now:
                    raise CrashError
                return out

            with monkeypatch.context() as patch:
                patch.setattr(Path, "replace", crash)
                try:
                    add_steps(
                        WriteBack(StoreReader(store), views_per_shard=views_per_shard),
                        records,
                        N,
                        3 * N,
                        batch_size=5,
                    )
                    break  # no crash so late
                except CrashError:
                    crashes += 1
            assert_whole(store, expected)
            write_back = WriteBack(StoreReader(store), views_per_shard=views_per_shard)
            add_steps(write_back, records, N, 3 * N, batch_size=4)
            write_back.close()
            assert_same_store(store, expected)
    assert crashes >= 2 * 5  # shard, note, manifest, features and info at least


def test_machine_that_rounds_differently_is_reported(grown: Path, teacher_pass: TeacherPass):
    assert check_machine(StoreReader(grown), teacher_pass) is None
    forge_smallest_logit(grown, 1 + 2**-9)
    difference = check_machine(StoreReader(grown), teacher_pass)
    assert difference is not None
    assert "1 of 20 logits" in difference
    assert "13..16" in difference


@pytest.mark.usefixtures("deterministic")
def test_interrupted_addition_is_not_published(
    grown: Path, records: ViewRecords, monkeypatch: pytest.MonkeyPatch
):
    def stop(*arguments: object, **names: object) -> list[bytes]:
        raise Interrupted("SIGTERM: a test", exit_code=143)

    appending = Appending(
        StoreReader(grown),
        TeacherPass(None, None),  # type: ignore[arg-type]  # nothing is missing
        batch_size=5,
        views_per_shard=100,
        preemption=Preemption(),
    )
    write_back = appending.callback._write_back
    add_steps(write_back, records, N, 3 * N, batch_size=5)
    monkeypatch.setattr(RecordEncoder, "encode", stop)
    with pytest.raises(Interrupted), appending:
        add_steps(write_back, records, 3 * N, 4 * N, batch_size=5)
    assert StoreReader(grown).epochs == 1
    with appending:  # nor from memory when the context ends
        pass
    assert StoreReader(grown).epochs == 1
