"""pipeline.precomputing.shard_tasks: the shards that a store lacks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import UserError
from pipeline.precompute import main
from pipeline.precomputing.shard_tasks import cut_shards
from pipeline.precomputing.worker import ShardWorker
from pipeline.store.metadata import published_lengths
from pipeline.store.reader import StoreReader
from pipeline.store.shards import MAX_SHARDS, ShardTask
from pipeline.store.spec import Spec
from pipeline.store.splits import file_split
from tests.runs import fail
from tests.stores import Asked, N, job_for, shard_files, write_store


def lengths(tasks: list[ShardTask]) -> list[tuple[int, int, int]]:
    return [(task.number, task.first, task.records) for task in tasks]


@pytest.mark.parametrize(
    ("published", "total", "expected"),
    [
        ([], 51, [(0, 0, 20), (1, 20, 20), (2, 40, 11)]),
        ([], 40, [(0, 0, 20), (1, 20, 20)]),
        ([], 3, [(0, 0, 3)]),
        ([20, 20, 11], 51, []),
        ([20, 20, 11], 34, []),
        ([20, 20, 11], 68, [(3, 51, 17)]),
        ([20, 20, 11], 102, [(3, 51, 20), (4, 71, 20), (5, 91, 11)]),
        ([7, 50], 60, [(2, 57, 3)]),
    ],
)
def test_missing_shards_are_cut_from_the_published_end(
    published: list[int], total: int, expected: list[tuple[int, int, int]]
) -> None:
    tasks = cut_shards("views", published=published, total=total, views_per_shard=20)
    assert lengths(tasks) == expected
    assert all(task.split == "views" for task in tasks)


def test_missing_shards_always_end_at_the_total_without_gaps() -> None:
    for end in range(12):
        for total in range(1, 40):
            for per_shard in (1, 3, 7, 50):
                tasks = cut_shards(
                    "v", published=[end] if end else [], total=total, views_per_shard=per_shard
                )
                covered = [v for task in tasks for v in range(task.first, task.first + task.records)]
                assert covered == list(range(end, total))
                assert all(1 <= task.records <= per_shard for task in tasks)


def test_five_digits_number_every_shard() -> None:
    tasks = cut_shards("views", published=[1] * 99_990, total=99_999, views_per_shard=1)
    assert tasks[-1].number == MAX_SHARDS - 1 == 99_998
    with pytest.raises(UserError) as caught:
        cut_shards("views", published=[], total=1_000_000, views_per_shard=10)
    for part in ("`views_per_shard`=10:", "100000", "99999", "`views_per_shard`=11 "):
        assert part in str(caught.value)
    assert len(cut_shards("views", published=[], total=1_000_000, views_per_shard=11)) <= MAX_SHARDS
    with pytest.raises(UserError, match="`views_per_shard`=30 "):
        cut_shards("views", published=[1] * 99_998, total=99_998 + 30, views_per_shard=1)
    with pytest.raises(UserError):  # not one number is left
        cut_shards("views", published=[1] * 99_999, total=100_000, views_per_shard=1000)


@pytest.fixture
def worker(tmp_path: Path, spec: Spec, data_dir: Path, teacher_path: Path) -> ShardWorker:
    return ShardWorker(job_for(tmp_path / "new", spec, data_dir, teacher_path))


def test_growing_keeps_the_old_shards_and_gives_the_store_of_one_run(
    worker: ShardWorker, published_store: Path
) -> None:
    store = Path(worker.job.store)
    seen: list[int] = []
    old: dict[str, bytes] = {}
    for epochs in (1, 1, 3, 2):
        write_store(worker, epochs=epochs)
        files = shard_files(store)
        assert old.items() <= files.items()
        old = files
        seen.append(StoreReader(store).epochs)
    assert seen == [1, 1, 3, 3]
    assert published_lengths(store) == {"views": [17, 20, 14]}
    # Cut elsewhere, but the same views.
    ours, theirs = (StoreReader(path).views.read(np.arange(3 * N)) for path in (store, published_store))
    np.testing.assert_array_equal(ours.crop_hash, theirs.crop_hash)
    np.testing.assert_allclose(ours.logits, theirs.logits, rtol=2.0**-9, atol=1e-3)


def test_evaluation_splits_added_later_stand_beside_the_old_ones(worker: ShardWorker, data_dir: Path) -> None:
    write_store(worker, epochs=1, eval_splits=("test",))
    write_store(worker, epochs=1, eval_splits=("test", "train"))
    store = StoreReader(worker.job.store)
    assert store.eval_splits == ["test", "train"]
    assert store.eval_reader("train").read(np.arange(N)).example.tolist() == list(range(N))
    assert store.eval_reader("test").num_records == 7


@pytest.mark.parametrize(
    ("published", "asked_for"), [("train[0shard]", "train[0shard:]"), ("train[:9]+test", "train[:9]+test[:]")]
)
def test_a_published_split_of_the_same_file_name_is_not_replaced(
    asked: Asked, published: str, asked_for: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert file_split(published) == file_split(asked_for)
    assert main(asked.flags("--epochs=1", f"--eval_splits={published}")) == 0
    before = shard_files(asked.store)
    flags = asked.flags("--epochs=1", f"--eval_splits={asked_for}", "--views_per_shard=3")
    code, line = fail(flags, capsys, main=main)
    assert code == 2
    assert published in line
    assert asked_for in line
    assert shard_files(asked.store) == before
