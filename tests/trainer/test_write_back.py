"""trainer.train --write_back: the online logits are the store's next shards, byte for byte, after any crash."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline import verify
from pipeline.dataset import Dataset
from pipeline.errors import EXIT_DATA_ERROR, EXIT_USER_ERROR, Interrupted
from pipeline.provenance import load_teacher
from pipeline.store.lock import writer_lock
from pipeline.store.metadata import INFO_FILE, MANIFEST_FILE
from pipeline.store.reader import Store
from pipeline.store.shards import PENDING
from pipeline.store.spec import Spec
from pipeline.views.input import ViewInput
from pipeline.views.records import ViewRecords
from pipeline.worker import ShardWorker
from tests import stores
from tests.runs import (
    ROOT,
    arguments,
    command,
    environment,
    fail,
    forge_records,
    losses,
    metrics,
    run_process,
    start_run,
)
from tests.trainer.test_endless import run_until
from trainer.online import ContinuedViews
from trainer.preemption import EXIT_PREEMPTED, Preemption
from trainer.replay import replay_input
from trainer.train import main
from trainer.write_back import Appending, TeacherPass, WriteBack, check_machine

N = stores.N
Precompute = Callable[..., Path]


@pytest.fixture
def grown(one_epoch: Path, tmp_path: Path) -> Path:
    """A copy of the store of one epoch, to grow."""
    return Path(shutil.copytree(one_epoch, tmp_path / "store"))


@pytest.fixture(scope="module")
def precompute(
    one_epoch: Path, spec: Spec, data_dir: Path, teacher_path: Path, tmp_path_factory
) -> Precompute:
    """Grows a copy of the same store with the precompute's worker, to each number of epochs in turn."""

    def grow(*epochs: int, views_per_shard: int) -> Path:
        store = Path(shutil.copytree(one_epoch, tmp_path_factory.mktemp("precomputed") / "store"))
        worker = ShardWorker(stores.job_for(store, spec, data_dir, teacher_path))
        for count in epochs:
            stores.write_store(worker, epochs=count, views_per_shard=views_per_shard, eval_splits=())
        return store

    return grow


def files(store: Path) -> dict[str, bytes]:
    """All that is published, by path."""
    metadata = {name: (store / name).read_bytes() for name in (MANIFEST_FILE, INFO_FILE, "features.json")}
    shards = stores.shard_files(store)
    return {**{name: data for name, data in shards.items() if not name.startswith(PENDING)}, **metadata}


def assert_same_store(got: Path, expected: Path) -> None:
    ours, theirs = files(got), files(expected)
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if ours[name] != theirs[name]] == []


def assert_whole(store: Path, expected: Path) -> int:
    """What is published is part of a longer store, and verifies; how many epochs it is."""
    opened, longer = Store(store), Store(expected)
    opened.check_files()
    for number in range(len(opened.views.manifest.shards)):
        opened.views.verify(number)
    views = np.arange(opened.views.num_records)
    ours, theirs = opened.views.read(views), longer.views.read(views)
    for field in dataclasses.fields(ViewRecords):
        np.testing.assert_array_equal(getattr(ours, field.name), getattr(theirs, field.name))
    return opened.epochs


@pytest.fixture
def argv(grown: Path, data_dir: Path, teacher_path: Path, tmp_path: Path) -> list[str]:
    """A run that writes back, but for its length; 5 views a step, teacher batches of 4."""
    flags = ("--write_back", "--log_every=1", "--deterministic", f"--teacher={teacher_path}")
    return arguments(grown, tmp_path / "run", data_dir, *flags)


# With real runs.


@pytest.mark.usefixtures("deterministic")
def test_shards_are_the_precompute_s_and_the_next_student_needs_no_teacher(
    argv: list[str],
    grown: Path,
    data_dir: Path,
    teacher_path: Path,
    precompute: Precompute,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    assert main([*argv, "--epochs=6", "--views_per_shard=40"]) == 0  # two epochs of 17 a shard, and one left
    assert f"--write_back: 5 epochs appended to {grown}, which holds 6 now" in capsys.readouterr().out
    assert_same_store(grown, precompute(6, views_per_shard=2 * N))
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["epochs_written_back"] == 5
    # 102 views are 20 steps of 5; the last two were trained on by nobody, and complete the epoch.
    assert result["steps"] == 20
    flags = [f"--store={grown}", f"--data_dir={data_dir}", f"--teacher={teacher_path}", "--fraction=1"]
    assert verify.main(flags) == 0

    assert main(arguments(grown, tmp_path / "next", data_dir, "--log_every=1", "--deterministic")) == 0
    capsys.readouterr()
    assert losses(tmp_path / "next") == losses(tmp_path / "run")
    # The store goes on growing as any.
    worker = ShardWorker(stores.job_for(grown, Store(grown).spec, data_dir, teacher_path))
    stores.write_store(worker, epochs=8, views_per_shard=20, eval_splits=())
    assert Store(grown).epochs == 8


@pytest.mark.slow
@pytest.mark.usefixtures("deterministic")
def test_run_without_an_end_that_is_stopped_and_continued_leaves_whole_epochs(
    argv: list[str], grown: Path, precompute: Precompute, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    flags = [*argv, "--epochs=inf", "--views_per_shard=1000"]
    assert run_until(12, flags, tmp_path / "run") == EXIT_PREEMPTED  # 60 views, three epochs and more
    held = Store(grown).epochs
    assert held >= 3
    assert f"which holds {held} now" in capsys.readouterr().out
    assert run_until(25, flags, tmp_path / "run") == EXIT_PREEMPTED
    assert "the teacher runs again on" in capsys.readouterr().out
    reached = Store(grown).epochs
    assert reached >= 7
    expected = precompute(held, reached, views_per_shard=1000)
    assert_same_store(grown, expected)
    assert [line["step"] for line in metrics(tmp_path / "run", "train")] == list(
        range(1, max(losses(tmp_path / "run")) + 1)
    )


@pytest.mark.slow
@pytest.mark.parametrize("moment", [9, 16, 30])
def test_killed_run_goes_on_and_the_store_is_the_same(
    argv: list[str], grown: Path, precompute: Precompute, tmp_path: Path, moment: int
):
    flags = [*argv, "--epochs=12", "--views_per_shard=40", "--checkpoint_every=7"]
    process = subprocess.Popen(
        command(flags), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    path, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
    while not (path.exists() and f'"step": {moment},' in path.read_text()):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    expected = precompute(12, views_per_shard=2 * N)
    assert assert_whole(grown, expected) < 12
    run_process(flags)
    if Store(grown).epochs == 12:
        assert_whole(grown, expected)
    assert list(losses(tmp_path / "run")) == list(range(1, 12 * N // 5 + 1))
    assert_same_store(grown, expected)


# The writer alone, and the teacher as the precompute runs it.


@pytest.fixture(scope="module")
def teacher_pass(one_epoch: Path, data_dir: Path, teacher_path: Path) -> TeacherPass:
    """The teacher on any views."""
    store = Store(one_epoch)
    dataset = Dataset(stores.DATASET, "train", data_dir=data_dir)
    source = replay_input(store, dataset, batch_size=1, image_cache_bytes=0).source
    view_input = ViewInput(ContinuedViews.of(store).sampled, source, stores.BATCH)
    return TeacherPass(view_input, load_teacher(store.spec, str(teacher_path)))


@pytest.fixture(scope="module")
def records(teacher_pass: TeacherPass) -> ViewRecords:
    """The records of 9 epochs of views with the teacher's own logits."""
    parts = [part for _, part in teacher_pass.records(0, 9 * N)]
    columns = [field.name for field in dataclasses.fields(ViewRecords)]
    return ViewRecords(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in columns})


def add_steps(write_back: WriteBack, records: ViewRecords, start: int, stop: int, *, batch_size: int) -> None:
    """What a run's steps from view `start` on bring."""
    for first in range(start, stop, batch_size):
        last = min(first + batch_size, stop)
        write_back.add(first, records.take(np.arange(first, last)))


@pytest.mark.parametrize("batch_size", [1, 4, 5, 17, 64])
def test_bytes_do_not_depend_on_the_student_s_batches(
    grown: Path, records: ViewRecords, precompute: Precompute, batch_size: int
):
    write_back = WriteBack(Store(grown), views_per_shard=60)  # three epochs a shard, no multiple of 4
    add_steps(write_back, records, 0, 9 * N - 3, batch_size=batch_size)
    write_back.close()
    assert write_back.published_views == 7 * N
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
    write_back = WriteBack(Store(grown), views_per_shard=60)
    add_steps(write_back, records, N, 4 * N, batch_size=5)
    write_back.close()
    assert_same_store(grown, precomputed)


def test_epoch_longer_than_a_shard_is_published_with_its_last_shard(
    grown: Path, records: ViewRecords, precompute: Precompute
):
    write_back = WriteBack(Store(grown), views_per_shard=8)
    add_steps(write_back, records, N, 2 * N - 1, batch_size=3)
    assert Store(grown).epochs == 1
    add_steps(write_back, records, 2 * N - 1, 4 * N + 9, batch_size=3)
    write_back.close()
    assert_same_store_but_for_pending(grown, precompute(2, 3, 4, views_per_shard=8))
    # What was finished of the epoch that is not whole is there for the next run.
    again = WriteBack(Store(grown), views_per_shard=8)
    assert again.next_view == 4 * N + 8
    add_steps(again, records, 4 * N + 5, 5 * N, batch_size=3)
    assert_same_store(grown, precompute(2, 3, 4, 5, views_per_shard=8))


def assert_same_store_but_for_pending(got: Path, expected: Path) -> None:
    ours, theirs = files(got), files(expected)
    assert {name: ours[name] for name in theirs} == theirs
    assert len(ours) == len(theirs) + 1


def test_hole_before_the_views_is_never_written(grown: Path, records: ViewRecords):
    write_back = WriteBack(Store(grown), views_per_shard=40)
    with pytest.raises(ValueError, match=r"views 17\.\.19 are missing"):
        write_back.add(20, records.take(np.arange(20, 25)))


class CrashError(Exception):
    """In place of a power cut."""


@pytest.mark.parametrize("views_per_shard", [8, 40])
def test_crash_at_any_rename_leaves_whole_epochs_and_the_next_run_ends_alike(
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
                        WriteBack(Store(store), views_per_shard=views_per_shard),
                        records,
                        N,
                        3 * N,
                        batch_size=5,
                    )
                    break  # no crash so late
                except CrashError:
                    crashes += 1
            assert_whole(store, expected)
            write_back = WriteBack(Store(store), views_per_shard=views_per_shard)
            add_steps(write_back, records, N, 3 * N, batch_size=4)
            write_back.close()
            assert_same_store(store, expected)
    assert crashes >= 2 * 5  # shard, note, manifest, features and info at least


# What is refused.


def test_views_that_were_trained_on_without_being_kept_are_made_up_for_or_refused(
    argv: list[str], grown: Path, precompute: Precompute, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    plain = [flag for flag in argv if flag != "--write_back"]
    start_run([*plain, "--steps=14"]).checkpoints.save(14)
    before = files(grown)
    code, line = fail([*argv, "--steps=17", "--views_per_shard=40"], capsys)
    assert code == EXIT_USER_ERROR
    assert "the run goes on at view 70, the store" in line
    assert "ends at 17" in line
    assert "precompute --epochs=5 first" in line
    assert files(grown) == before
    assert main([*argv, "--steps=17", "--views_per_shard=60"]) == 0
    assert "the teacher runs again on 53 views" in capsys.readouterr().out
    assert_same_store(grown, precompute(5, views_per_shard=3 * N))


def test_store_is_locked_for_writers_and_open_to_readers(
    argv: list[str], grown: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with writer_lock(grown):
        code, line = fail([*argv, "--epochs=2"], capsys)
        assert code == EXIT_USER_ERROR
        assert "is writing it" in line
        assert start_run(arguments(grown, tmp_path / "reader", data_dir)).train()["steps"] == 3
    code, line = fail([flag.replace(str(grown), str(tmp_path / "nowhere")) for flag in argv], capsys)
    assert code == EXIT_USER_ERROR
    assert not (tmp_path / "nowhere").exists()


def forge_smallest_logit(store: Path, factor: float) -> None:
    """Scales a logit of view 16, so that its largest one stays as it is."""
    logits = Store(store).views.read(np.array([16])).logits[0]
    logits[int(np.argmin(np.abs(logits)))] *= factor
    forge_records(store, 16, logits=logits)


def test_machine_that_rounds_otherwise_is_told(grown: Path, teacher_pass: TeacherPass):
    assert check_machine(Store(grown), teacher_pass) is None
    forge_smallest_logit(grown, 1 + 2**-9)
    told = check_machine(Store(grown), teacher_pass)
    assert told is not None
    assert told.startswith("1 of 20 logits of views 13..16 differ from the stored ones, by at most")


def test_teacher_that_says_something_else_is_refused(
    argv: list[str], grown: Path, capsys: pytest.CaptureFixture[str]
):
    forge_smallest_logit(grown, 1.5)
    before = files(grown)
    code, line = fail([*argv, "--steps=7"], capsys)
    assert code == EXIT_DATA_ERROR
    assert "--write_back: of views 13..16 the teacher's logits differ by up to" in line
    assert files(grown) == before


def test_mistakes_are_refused(argv: list[str], capsys: pytest.CaptureFixture[str]):
    without_teacher = [flag for flag in argv if not flag.startswith("--teacher")]
    code, line = fail([*without_teacher, "--steps=2"], capsys)
    assert code == EXIT_USER_ERROR
    assert "--write_back needs --teacher" in line
    code, line = fail([*argv, "--steps=9", "--steps_per_execution=3"], capsys)
    assert code == EXIT_USER_ERROR
    assert "--write_back: with --steps_per_execution=3" in line
    code, line = fail([*argv, "--steps=9", "--jit_compile"], capsys)
    assert code == EXIT_USER_ERROR
    assert "--write_back: with --jit_compile" in line


@pytest.mark.slow  # a process of its own, for its devices
def test_replicas_are_refused(argv: list[str], grown: Path, capsys: pytest.CaptureFixture[str]):
    flags = [*argv, "--steps=9", "--batch_size=4", "--strategy=mirrored", "--replicas=2"]
    done = subprocess.run(command(flags), cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == EXIT_USER_ERROR
    assert "error: --write_back: with 2 replicas" in done.stderr


@pytest.mark.usefixtures("deterministic")
def test_interrupted_addition_is_not_published(
    grown: Path, records: ViewRecords, monkeypatch: pytest.MonkeyPatch
):
    def stop(*arguments: object, **names: object) -> list[bytes]:
        raise Interrupted("SIGTERM: a test", exit_code=143)

    appending = Appending(
        Store(grown),
        TeacherPass(None, None),  # type: ignore[arg-type]  # nothing is missing
        batch_size=5,
        views_per_shard=100,
        preemption=Preemption(),
    )
    write_back = appending.callback._write_back
    add_steps(write_back, records, N, 3 * N, batch_size=5)
    monkeypatch.setattr("trainer.write_back.encode_records", stop)
    with pytest.raises(Interrupted), appending:
        add_steps(write_back, records, 3 * N, 4 * N, batch_size=5)
    assert Store(grown).epochs == 1
    with appending:  # nor in any other way, from what is in memory
        pass
    assert Store(grown).epochs == 1
