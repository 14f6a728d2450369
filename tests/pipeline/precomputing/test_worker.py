"""pipeline.precomputing.worker: a shard depends only on spec, first view and number of views."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from pipeline.errors import DataError, TryAgainError, UserError
from pipeline.inputs.dataset import Dataset
from pipeline.inputs.teacher import Teacher
from pipeline.precomputing.progress import progress_name
from pipeline.precomputing.worker import ShardResult, ShardWorker
from pipeline.store.layout import PENDING
from pipeline.store.openers import DiskOpener
from pipeline.store.reader import SplitReader, StoreReader
from pipeline.store.shards import ShardTask, check_shard, open_shard, shard_name
from pipeline.store.spec import Spec
from pipeline.views.batches import partner_views
from pipeline.views.render import eval_renderer
from tests.stores import (
    BATCH,
    CLASSES,
    DATASET,
    SIZE,
    N,
    PlainTeacher,
    job_for,
    make_spec,
    save_teacher,
    shard_files,
    write_store,
)


@pytest.fixture(scope="module")
def worker(
    tmp_path_factory: pytest.TempPathFactory, spec: Spec, data_dir: Path, teacher_path: Path
) -> ShardWorker:
    """One worker per process; each test gives it another store."""
    return ShardWorker(job_for(tmp_path_factory.mktemp("unused"), spec, data_dir, teacher_path))


def at(worker: ShardWorker, store: Path, monkeypatch: pytest.MonkeyPatch) -> ShardWorker:
    store.mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(worker, "job", dataclasses.replace(worker.job, store=str(store)))
    return worker


def test_two_runs_write_identical_bytes(
    tmp_path: Path, spec: Spec, data_dir: Path, teacher_path: Path, published_store: Path
) -> None:
    """The second with decoded images in memory and at another path."""
    worker = ShardWorker(job_for(tmp_path / "b", spec, data_dir, teacher_path, cache_bytes=1 << 30))
    write_store(worker, epochs=3)
    assert worker.input_of("views").source.cached
    assert shard_files(tmp_path / "b") == shard_files(published_store)
    for name in ("manifest.json", "features.json", "dataset_info.json", "eval/manifest.json"):
        assert (tmp_path / "b" / name).read_bytes() == (published_store / name).read_bytes(), name


def test_shards_in_any_order_and_one_at_a_time_are_the_same(
    tmp_path: Path, worker: ShardWorker, published_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = [
        ShardTask(split="views", number=i, first=20 * i, records=min(20, 51 - 20 * i)) for i in (2, 0, 1)
    ]
    for task in tasks:
        at(worker, tmp_path / "store", monkeypatch).run(task)
        written = (tmp_path / "store" / task.name).read_bytes()
        assert written == (published_store / task.name).read_bytes()


def test_logits_are_those_of_the_mixed_views(published_store: Path, worker: ShardWorker) -> None:
    """Compared with a teacher that was not saved, on crops mixed in NumPy, within float16."""
    views = StoreReader(published_store).views
    count = 3 * N
    crops = {}
    for batch in worker.input_of("views").batches(np.arange(0, count, BATCH)):
        for view, crop in zip(batch["views"].numpy().tolist(), batch["crops"].numpy(), strict=True):
            crops[view] = crop.astype(np.float32)
    ratio = worker.spec.policy.draw_ratios(np.arange(count), seed=0)
    partner = partner_views(np.arange(count), num_examples=N)
    mixed = np.stack([ratio[v] * crops[v] + (1 - ratio[v]) * crops[int(partner[v])] for v in range(count)])
    expected = PlainTeacher()(mixed).numpy()
    found = views.read(np.arange(count)).logits
    assert (np.abs(found - expected) <= np.abs(expected) * 2.0**-10 + 1e-4).all()
    assert expected.std(axis=0).min() > 0.05  # so that a shuffled row would show


def test_evaluation_logits_are_those_of_unmixed_crops(
    published_store: Path, worker: ShardWorker, data_dir: Path
) -> None:
    spec, dataset = worker.spec, Dataset(DATASET, "test", data_dir=data_dir)
    renderer = eval_renderer(spec.eval_crop, SIZE)
    sizes = np.array([renderer.prepare(e).shape[:2] for e in dataset.read(np.arange(7))])
    crops = []
    for encoded, (height, width) in zip(dataset.read(np.arange(7)), sizes, strict=True):
        y, x = (height - SIZE) // 2, (width - SIZE) // 2
        crops.append(renderer.prepare(encoded).numpy()[y : y + SIZE, x : x + SIZE])
    expected = PlainTeacher()(np.stack(crops).astype(np.float32)).numpy()
    found = StoreReader(published_store).eval_reader("test").read(np.arange(7)).logits
    assert (np.abs(found - expected) <= np.abs(expected) * 2.0**-10 + 1e-4).all()


def test_every_epoch_holds_every_example_once(published_store: Path) -> None:
    examples = StoreReader(published_store).views.read(np.arange(3 * N)).example.reshape(3, N)
    np.testing.assert_array_equal(np.sort(examples, axis=1), np.tile(np.arange(N), (3, 1)))
    assert len({tuple(epoch) for epoch in examples}) == 3


def test_a_view_does_not_depend_on_how_shards_are_cut(
    tmp_path: Path, worker: ShardWorker, published_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards of 9 and 42 views instead of 20, 20 and 11: other teacher batches, and padded ones."""
    moved = at(worker, tmp_path / "store", monkeypatch)
    tasks = [
        ShardTask(split="views", number=0, first=0, records=9),
        ShardTask(split="views", number=1, first=9, records=42),
    ]
    infos = tuple(moved.run(task).info for task in tasks)
    published = StoreReader(published_store).views
    manifest = dataclasses.replace(published.manifest, shards=infos)
    reader = SplitReader(
        "views",
        manifest,
        DiskOpener(tmp_path / "store", "views", manifest.shards),
        codec=published.codec,
        num_examples=N,
    )
    here, there = reader.read(np.arange(3 * N)), published.read(np.arange(3 * N))
    for name in ("example", "box", "flip", "ratio", "crop_hash", "source_hash"):
        np.testing.assert_array_equal(getattr(here, name), getattr(there, name), err_msg=name)
    np.testing.assert_allclose(here.logits, there.logits, rtol=2.0**-9, atol=1e-4)


def test_a_finished_shard_is_adopted_and_never_replaced(
    tmp_path: Path, worker: ShardWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = at(worker, tmp_path / "store", monkeypatch)
    task = ShardTask(split="views", number=1, first=20, records=6)
    first = moved.run(task)
    path = tmp_path / "store" / task.name
    before = path.stat()
    again = moved.run(task)
    assert (first.adopted, again.adopted) == (False, True)
    assert again.info == first.info
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    content = path.read_bytes()
    path.unlink()
    assert not moved.run(task).adopted
    assert path.read_bytes() == content
    # A longer run cuts its shards elsewhere, and takes nothing that is not exactly its own; nor does it replace it.
    with pytest.raises(TryAgainError, match=task.name):
        moved.run(dataclasses.replace(task, records=7))
    assert path.read_bytes() == content


def test_real_duplicates_of_a_task_write_one_shard(
    tmp_path: Path, worker: ShardWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six at once, and a late one on a machine that rounds differently, which adopts the first result."""
    moved = at(worker, tmp_path / "store", monkeypatch)
    task = ShardTask(split="views", number=0, first=0, records=20)
    moved.input_of("views")
    together = threading.Barrier(6)

    def run(_: int) -> ShardResult:
        together.wait()
        return moved.run(task)

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        results = list(pool.map(run, range(6)))
    assert len({result.info for result in results}) == 1
    path = tmp_path / "store" / task.name
    check_shard(path, results[0].info)
    assert sorted(p.name for p in path.parent.iterdir()) == ["pending", task.name]
    before, content = path.stat(), path.read_bytes()
    original = moved.run_teacher
    monkeypatch.setattr(moved, "run_teacher", lambda batch, **split: original(batch, **split) + np.float32(1))
    note = path.parent / "pending" / f"{task.name}.json"
    kept = note.read_text()
    note.unlink()  # as after its publication, so that the straggler computes
    with pytest.raises(TryAgainError):
        moved.run(task)
    monkeypatch.setattr(
        moved,
        "run_teacher",
        lambda batch, **split: (note.write_text(kept), original(batch, **split) + np.float32(1))[1],
    )
    assert moved.run(task).info == results[0].info
    assert (path.stat().st_ino, path.read_bytes()) == (before.st_ino, content)


def test_progress_is_noted_and_ends_at_the_shards_length(
    tmp_path: Path, worker: ShardWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the first batch, at most every half second, and with the last view."""
    moved = at(worker, tmp_path / "store", monkeypatch)
    task = ShardTask(split="views", number=0, first=0, records=10)
    path = tmp_path / "store" / PENDING / progress_name(task)
    seen: list[str | None] = []
    original = moved.run_teacher

    def run_teacher(*args: Any, **names: Any) -> np.ndarray:
        seen.append(path.read_text() if path.exists() else None)
        return original(*args, **names)

    monkeypatch.setattr(moved, "run_teacher", run_teacher)
    moved.run(task)
    assert seen[:2] == [None, str(BATCH)]
    assert path.read_text() == "10"
    path.unlink()
    assert moved.run(task).adopted
    assert path.read_text() == "10"


def test_a_shard_that_fails_leaves_nothing(
    tmp_path: Path, data_dir: Path, spec: Spec, teacher_path: Path
) -> None:
    """An image of the data set is truncated: the error names it, and neither shard nor temporary file is left."""
    data = Path(shutil.copytree(data_dir, tmp_path / "data"))
    (tmp_path / "store").mkdir()
    worker = ShardWorker(job_for(tmp_path / "store", spec, data, teacher_path))
    dataset = worker.input_of("views").source.images
    whole = dataset.read(np.array([0]))[0]
    original = dataset.read

    def read(examples: np.ndarray) -> list[bytes]:
        return [image[:50] if image == whole else image for image in original(examples)]

    dataset.read = read  # type: ignore[attr-defined, method-assign]
    with pytest.raises(DataError, match="example 0: 50 bytes"):
        worker.run(ShardTask(split="views", number=0, first=0, records=17))
    left = [p for p in (tmp_path / "store").rglob("*") if p.is_file() and not p.name.endswith(".progress")]
    assert left == []


def test_a_teacher_that_returns_nan_writes_nothing(tmp_path: Path, data_dir: Path) -> None:
    module = PlainTeacher()
    path = save_teacher(
        tmp_path / "t",
        lambda image: {"logits": tf.where(tf.reduce_mean(image) < 1e9, np.nan, module(image))},
        module=module,
    )
    (tmp_path / "store").mkdir()
    worker = ShardWorker(job_for(tmp_path / "store", make_spec(data_dir, path), data_dir, path))
    with pytest.raises(DataError, match=r"logit 0 of view 0 \(example \d+, mixed with example \d+\) is nan"):
        worker.run(ShardTask(split="views", number=0, first=0, records=4))
    assert not list((tmp_path / "store").glob("*.array_record*"))


def test_another_data_set_is_refused_with_both_sides(
    tmp_path: Path, spec: Spec, other_data_dir: Path, teacher_path: Path
) -> None:
    worker = ShardWorker(job_for(tmp_path, spec, other_data_dir, teacher_path))
    here = Dataset(DATASET, "train", data_dir=other_data_dir).identity().fingerprint
    with pytest.raises(DataError) as caught:
        worker.input_of("views")
    assert here in str(caught.value)
    assert spec.dataset.fingerprint in str(caught.value)


def test_another_evaluation_split_is_refused_with_both_sides(
    tmp_path: Path, spec: Spec, data_dir: Path, other_data_dir: Path, teacher_path: Path
) -> None:
    here, there = (Dataset(DATASET, "test", data_dir=path).identity() for path in (data_dir, other_data_dir))
    job = dataclasses.replace(job_for(tmp_path, spec, data_dir, teacher_path), eval_datasets=(there,))
    with pytest.raises(DataError) as caught:
        ShardWorker(job).input_of("test")
    assert here.fingerprint in str(caught.value)
    assert there.fingerprint in str(caught.value)


def test_another_teacher_is_refused_with_both_sides(
    tmp_path: Path, spec: Spec, data_dir: Path, keras_teacher_path: Path
) -> None:
    other = Teacher(keras_teacher_path, image_size=SIZE, num_classes=CLASSES).identity(batch_size=BATCH)
    with pytest.raises(DataError) as caught:
        ShardWorker(job_for(tmp_path, spec, data_dir, keras_teacher_path))
    assert other.fingerprint in str(caught.value)
    assert spec.teacher.fingerprint in str(caught.value)


def test_another_renderer_is_refused(tmp_path: Path, spec: Spec, data_dir: Path, teacher_path: Path) -> None:
    other = dataclasses.replace(spec, render_probe="0123456789abcdef")
    with pytest.raises(DataError, match="0123456789abcdef"):
        ShardWorker(job_for(tmp_path, other, data_dir, teacher_path))


def test_probabilities_are_refused_before_the_work(tmp_path: Path, data_dir: Path) -> None:
    module = PlainTeacher()
    path = save_teacher(tmp_path / "t", lambda image: {"p": tf.nn.softmax(module(image))}, module=module)
    worker = ShardWorker(job_for(tmp_path, make_spec(data_dir, path), data_dir, path))
    with pytest.raises(UserError, match="probabilities"):
        worker.try_teacher()


def test_the_teacher_is_timed(worker: ShardWorker) -> None:
    assert 0 < worker.try_teacher() < 10


def test_published_shards_have_their_lengths(published_store: Path) -> None:
    for number, records in enumerate((20, 20, 11)):
        open_shard(published_store / shard_name("views", number), records).close()
