"""pipeline.precompute: the command, on real runners, killed, continued and grown."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from pipeline.errors import DataError, UserError, find_error, run_command
from pipeline.precompute import (
    check_store,
    claim_store,
    cut_shards,
    main,
    open_store,
    publish_results,
)
from pipeline.store.lock import writer_lock
from pipeline.store.metadata import load_manifest, published_lengths
from pipeline.store.reader import Store
from pipeline.store.shards import MAX_SHARDS, ShardTask, shard_name
from pipeline.store.spec import SPEC_FILE, Spec
from pipeline.worker import ShardResult, ShardWorker
from tests.images import TRAIN_IMAGES, encoded_images
from tests.stores import (
    BATCH,
    DATASET,
    SIZE,
    N,
    PlainTeacher,
    job_for,
    make_spec,
    prepare_dataset,
    save_teacher,
    shard_files,
    write_store,
)

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "pipeline.precompute"]


@dataclasses.dataclass(frozen=True)
class Asked:
    """A command's flags."""

    data_dir: Path
    teacher: Path
    store: Path

    def flags(self, *others: str) -> list[str]:
        return [
            "--runner=FnApiRunner",
            f"--dataset={DATASET}",
            f"--data_dir={self.data_dir}",
            f"--teacher={self.teacher}",
            f"--store={self.store}",
            f"--image_size={SIZE}",
            f"--teacher_batch_size={BATCH}",
            "--temperature=2",
            "--views_per_shard=20",
            "--eval_splits=test",
            "--epochs=3",
            *others,
        ]


@pytest.fixture
def asked(data_dir: Path, teacher_path: Path, tmp_path: Path) -> Asked:
    """The flags of the published store, with a store of their own."""
    return Asked(data_dir, teacher_path, tmp_path / "new")


# --- shards, without a runner


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
    assert "--views_per_shard=10: 100000 shards, at most 99999; use --views_per_shard=11 or more" in str(
        caught.value
    )
    assert len(cut_shards("views", published=[], total=1_000_000, views_per_shard=11)) <= MAX_SHARDS
    with pytest.raises(UserError, match="use --views_per_shard=30 or more"):
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
        seen.append(Store(store).epochs)
    assert seen == [1, 1, 3, 3]
    assert published_lengths(store) == {"views": [17, 20, 14]}
    # Cut elsewhere, but the same views.
    ours, theirs = (Store(path).views.read(np.arange(3 * N)) for path in (store, published_store))
    np.testing.assert_array_equal(ours.crop_hash, theirs.crop_hash)
    np.testing.assert_allclose(ours.logits, theirs.logits, rtol=2.0**-9, atol=1e-3)


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
    """Takes back the store's metadata to shards of these lengths."""
    if not lengths:
        (store / "dataset_info.json").unlink()
        return
    info = json.loads((store / "dataset_info.json").read_text())
    info["splits"][0]["shardLengths"] = [str(n) for n in lengths]
    (store / "dataset_info.json").write_text(json.dumps(info))


def test_results_are_published_in_the_order_of_their_numbers(store: Path) -> None:
    spec, results = Spec.load(store), results_of(store, 2, 0, 1)
    unpublish(store)
    publish_results(str(store), spec, results, {"views": spec.dataset})
    assert published_lengths(store) == {"views": [20, 20, 11]}
    Store(store).views.read(np.arange(51))


def test_publishing_twice_is_publishing_once(store: Path) -> None:
    """A runner may run a step again whose first run had done its work."""
    spec = Spec.load(store)
    results = [*results_of(store, 0, 1, 2), *results_of(store, 0, split="test")]
    identities = {
        "views": spec.dataset,
        "test": load_manifest(store / "eval", digest=spec.digest())["test"].dataset,
    }
    before = {name: (store / name).read_bytes() for name in ("dataset_info.json", "eval/dataset_info.json")}
    publish_results(str(store), spec, results, identities)
    assert {name: (store / name).read_bytes() for name in before} == before


def test_a_gap_is_never_published(store: Path) -> None:
    spec, results = Spec.load(store), results_of(store, 2)
    unpublish(store, 20)
    with pytest.raises(DataError, match=r"views.array_record-00002: finished, but only 1 shards precede it"):
        publish_results(str(store), spec, results, {"views": spec.dataset})
    assert published_lengths(store) == {"views": [20]}


def test_a_published_shard_is_never_another(store: Path) -> None:
    spec, (result,) = Spec.load(store), results_of(store, 1)
    other = dataclasses.replace(result, info=dataclasses.replace(result.info, sha256="0" * 64))
    before = (store / "manifest.json").read_bytes()
    with pytest.raises(DataError, match=r"views.array_record-00001: published already, and not as it was"):
        publish_results(str(store), spec, [other], {"views": spec.dataset})
    assert (store / "manifest.json").read_bytes() == before


def test_evaluation_splits_added_later_stand_beside_the_old_ones(worker: ShardWorker, data_dir: Path) -> None:
    write_store(worker, epochs=1, eval_splits=("test",))
    write_store(worker, epochs=1, eval_splits=("test", "train"))
    store = Store(worker.job.store)
    assert store.eval_splits == ["test", "train"]
    assert store.eval_reader("train").read(np.arange(N)).example.tolist() == list(range(N))
    assert store.eval_reader("test").num_records == 7


# --- the store's directory


def test_a_foreign_directory_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(
        UserError, match=r"not a store and not empty \(photo.jpg, ...\); name another directory"
    ):
        open_store(str(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["photo.jpg"]


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "store").touch()
    with pytest.raises(UserError, match="a file is in the way"):
        open_store(str(tmp_path / "store"))


def test_a_directory_of_a_run_that_died_before_its_spec_is_taken(tmp_path: Path, spec: Spec) -> None:
    (tmp_path / ".lock").write_text("{}")
    (tmp_path / ".tmp-spec.json-1-ab").write_text("{")
    assert open_store(str(tmp_path)) == tmp_path
    check_store(tmp_path, spec)
    claim_store(tmp_path, spec)
    assert Spec.load(tmp_path) == spec
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_store_of_another_spec_is_refused_with_both_sides(store: Path, spec: Spec) -> None:
    other = dataclasses.replace(spec, seed=9, codec="float32")
    before = (store / SPEC_FILE).read_bytes()
    with pytest.raises(DataError) as caught:
        check_store(store, other)
    assert f"codec: float32 asked for, float16 in {store}" in str(caught.value)
    assert f"seed: 9 asked for, 0 in {store}" in str(caught.value)
    assert (store / SPEC_FILE).read_bytes() == before


# --- the command in this process, on Beam's Python runner


def test_the_command_writes_the_store_and_says_so(
    asked: Asked, published_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beam's graph writes what the worker writes without it; then it repeats, grows, and refuses."""
    assert main(asked.flags("--direct_num_workers=1")) == 0
    out = capsys.readouterr().out
    assert "58 views in 4 shards; teacher alone: " in out
    assert f"store: {asked.store}: 51 views (3 epochs of 17 examples)" in out
    assert "codec float16: mean KL " in out
    assert "this run: 58 views in " in out
    assert shard_files(asked.store) == shard_files(published_store)
    assert Spec.load(asked.store).digest() == Spec.load(published_store).digest()
    assert sorted(p.name for p in asked.store.iterdir() if not p.name.startswith(".")) == [
        "dataset_info.json",
        "eval",
        "features.json",
        "manifest.json",
        "spec.json",
        *(shard_name("views", i) for i in range(3)),
    ]
    # Repeated: nothing is written.
    before = {p: p.stat().st_mtime_ns for p in asked.store.rglob("*array_record*")}
    assert main(asked.flags()) == 0
    assert "nothing to do: 3 epochs or more are published" in capsys.readouterr().out
    assert main(asked.flags("--epochs=1")) == 0
    assert {p: p.stat().st_mtime_ns for p in asked.store.rglob("*array_record*")} == before
    # Grown, by one epoch in a shard of its own.
    assert main(asked.flags("--epochs=4", "--image_cache_bytes=0")) == 0
    assert published_lengths(asked.store)["views"] == [20, 20, 11, 17]
    assert {p: p.stat().st_mtime_ns for p in before} == before
    # Another spec on it.
    with pytest.raises(DataError, match="seed: 1 asked for, 0 in "):
        main(asked.flags("--seed=1"))


def test_a_second_writer_is_refused_before_it_changes_anything(asked: Asked) -> None:
    asked.store.mkdir()
    with (
        writer_lock(asked.store),
        pytest.raises(UserError, match=f"process {os.getpid()} on .* is writing it"),
    ):
        main(asked.flags())
    assert [p.name for p in asked.store.iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--epoch=3"], "unknown flag --epoch=3; did you mean --epochs?"),
        (["--epochs=-1"], "--epochs: -1: expected 1 or more"),
        (["--codec=float8"], "--codec=float8: expected one of float32, float16"),
        (["--teacher=nowhere"], "--teacher=nowhere: no such file or directory"),
        (["--dataset=no_such_photos"], "--dataset=no_such_photos: not found in"),
        (["--split=nope"], f"--split=nope: {DATASET}/1.0.0 has splits test, train"),
        (["--split=train[:0]"], "--split=train[:0]: "),
        (["--runner=NoRunner"], "--runner=NoRunner: "),
        (["--direct_num_worker=1"], "did you mean --direct_num_workers?"),
        (["--direct_running_mode=slow"], "--direct_running_mode"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_leaves_no_store(asked: Asked, flags: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        main(asked.flags(*flags))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (asked.store / SPEC_FILE).exists()


def test_a_data_set_in_another_format_is_refused(asked: Asked, tmp_path: Path) -> None:
    data = prepare_dataset(
        tmp_path / "tf", {"train": encoded_images(TRAIN_IMAGES[:2])}, file_format="tfrecord"
    )
    with pytest.raises(UserError, match=r"prepared as tfrecord .*--file_format=array_record"):
        main(asked.flags(f"--data_dir={data}"))


@pytest.mark.parametrize("text", ["", "{}", "not json"])
def test_a_garbled_spec_is_refused_and_kept(asked: Asked, text: str) -> None:
    asked.store.mkdir()
    (asked.store / SPEC_FILE).write_text(text)
    with pytest.raises(DataError, match=f"{SPEC_FILE}: not a store's spec"):
        main(asked.flags())
    assert (asked.store / SPEC_FILE).read_text() == text


@pytest.mark.parametrize("name", ["manifest.json", "dataset_info.json"])
def test_garbled_metadata_are_refused(asked: Asked, store: Path, name: str) -> None:
    (store / name).write_text("garbage")
    with pytest.raises(DataError, match=f"{name}: not "):
        main(dataclasses.replace(asked, store=store).flags("--epochs=4"))


def test_a_swapped_teacher_or_data_set_does_not_continue_a_store(
    asked: Asked, store: Path, other_data_dir: Path, keras_teacher_path: Path
) -> None:
    before = shard_files(store)
    for changed, field in (
        (dataclasses.replace(asked, store=store, teacher=keras_teacher_path), "teacher.fingerprint"),
        (dataclasses.replace(asked, store=store, data_dir=other_data_dir), "dataset.fingerprint"),
    ):
        with pytest.raises(DataError, match=rf"{field}: \w+ asked for, \w+ in {store}"):
            main(changed.flags("--epochs=4"))
    assert shard_files(store) == before


def test_a_swapped_evaluation_split_does_not_continue_a_store(
    asked: Asked, store: Path, data_dir: Path, tmp_path: Path
) -> None:
    """The data set was prepared again with the same training images and more to evaluate on."""
    data = prepare_dataset(
        tmp_path / "data",
        {"train": encoded_images(TRAIN_IMAGES), "test": encoded_images(TRAIN_IMAGES[:9], seed=3)},
    )
    before = published_lengths(store / "eval")
    with pytest.raises(DataError, match="num_examples: 9 here, 7 in "):
        main(dataclasses.replace(asked, store=store, data_dir=data).flags())
    assert published_lengths(store / "eval") == before


def test_the_teachers_error_comes_out_of_beam(asked: Asked, tmp_path: Path, data_dir: Path) -> None:
    """A teacher that breaks in the middle: the error is found, finished shards stay, nothing is published."""
    module = PlainTeacher()
    calls = tf.Variable(0)
    module.calls = calls

    def call(image: tf.Tensor) -> dict[str, tf.Tensor]:
        broken = calls.assign_add(1) > 14
        return {"logits": tf.where(broken, np.nan, module(image))}

    teacher = save_teacher(tmp_path / "t", call, module=module)
    with pytest.raises(Exception, match="nan") as caught:
        main(dataclasses.replace(asked, teacher=teacher).flags())
    found = find_error(caught.value)
    assert isinstance(found, DataError)
    assert "of the batch is nan; expected finite numbers" in str(found)
    assert "\n" not in str(found)
    assert not list(asked.store.rglob("dataset_info.json"))
    assert not list(asked.store.rglob(".tmp-*"))
    with writer_lock(asked.store):  # free again
        pass


# --- the command as a process


def start(flags: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, *flags], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_mistake_exits_2_with_one_line_on_standard_error(asked: Asked) -> None:
    with start(asked.flags("--epoch=3")) as process:
        stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 2
    assert stderr == "error: unknown flag --epoch=3; did you mean --epochs?\n"
    assert stdout == ""


def test_damaged_data_exit_3_with_one_line_on_standard_error(
    asked: Asked, capsys: pytest.CaptureFixture[str]
) -> None:
    asked.store.mkdir()
    (asked.store / SPEC_FILE).write_text("{}")
    with pytest.raises(SystemExit) as caught:
        run_command(main, asked.flags())
    assert caught.value.code == 3
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"error: {asked.store}/{SPEC_FILE}: not a store's spec")


EPOCHS, SHARD, LARGE_BATCH = 200, 1200, 32  # 3,400 views in three shards of about a second
LONGER = [f"--epochs={EPOCHS}", f"--views_per_shard={SHARD}", f"--teacher_batch_size={LARGE_BATCH}"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, data_dir: Path, teacher_path: Path) -> Path:
    """A longer store, written in one go without Beam's graph."""
    store = tmp_path_factory.mktemp("undisturbed") / "store"
    longer = make_spec(data_dir, teacher_path, batch_size=LARGE_BATCH)
    worker = ShardWorker(job_for(store, longer, data_dir, teacher_path, cache_bytes=1 << 30))
    write_store(worker, epochs=EPOCHS, views_per_shard=SHARD)
    return store


def killed_in_the_middle(flags: list[str], store: Path) -> None:
    """Runs the command until a shard of views is on disk and the next one is being written; then SIGKILL."""
    process = start(flags)
    with process:
        try:
            deadline = time.monotonic() + 200
            while True:
                assert process.poll() is None, f"ended before it could be killed: {process.communicate()[1]}"
                assert time.monotonic() < deadline, "no shard in 200 s"
                finished = list(store.glob("views.array_record-*"))
                if finished and list(store.glob(".tmp-views.array_record-*")):
                    break
                time.sleep(0.002)
        finally:
            process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL


def check_killed_and_continued(store: Path, undisturbed: Path, resume: Iterator[None]) -> None:
    finished = {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in store.glob("views.array_record-*")}
    in_flight = list(store.glob(".tmp-views.array_record-*"))
    assert finished
    assert in_flight
    # Nothing of it is published: a reader sees no store.
    with pytest.raises(UserError, match="nothing is published there yet"):
        Store(store)
    next(resume, None)
    assert shard_files(store) == shard_files(undisturbed)
    for name in ("manifest.json", "dataset_info.json", "features.json", "eval/manifest.json"):
        assert (store / name).read_bytes() == (undisturbed / name).read_bytes(), name
    assert Spec.load(store).digest() == Spec.load(undisturbed).digest()
    # Adopted: the finished shards were not written again.
    assert {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in finished} == finished
    assert not list(store.glob(".tmp-*"))
    assert not (store / "pending").exists()
    Store(store).views.read(np.arange(EPOCHS * N))


def test_a_run_killed_in_the_middle_continues_to_the_same_bytes(asked: Asked, undisturbed: Path) -> None:
    """SIGKILL with at least one shard published to its final name and one in flight; then the same command."""
    flags = asked.flags(*LONGER)
    killed_in_the_middle(flags, asked.store)

    def resume() -> Iterator[None]:
        assert main(flags) == 0
        yield

    check_killed_and_continued(asked.store, undisturbed, resume())


@pytest.mark.slow
def test_other_runners_and_several_processes_write_the_same_bytes(asked: Asked, undisturbed: Path) -> None:
    """Killed under DirectRunner, continued by two worker processes, in processes of their own throughout."""
    flags = asked.flags(*LONGER)
    killed_in_the_middle([*flags, "--runner=DirectRunner"], asked.store)

    def resume() -> Iterator[None]:
        several = ["--direct_running_mode=multi_processing", "--direct_num_workers=2"]
        with start([*flags, *several]) as process:
            _, stderr = process.communicate(timeout=500)
        assert process.returncode == 0, stderr
        yield

    check_killed_and_continued(asked.store, undisturbed, resume())


@pytest.mark.slow
@pytest.mark.parametrize("runner", ["DirectRunner", "PortableRunner"])
def test_a_whole_run_on_another_runner(asked: Asked, published_store: Path, runner: str) -> None:
    """PortableRunner with its embedded job service is what comes nearest to Prism."""
    flags = [f"--runner={runner}"]
    if runner == "PortableRunner":
        flags += ["--job_endpoint=embed", "--environment_type=LOOPBACK"]
    with start([*asked.flags(), *flags]) as process:
        _, stderr = process.communicate(timeout=500)
    assert process.returncode == 0, stderr
    assert shard_files(asked.store) == shard_files(published_store)
