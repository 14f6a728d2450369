"""pipeline.precompute: the command in this process, on Beam's Python runner."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from pipeline import inspect, verify
from pipeline.cli.main import run_command
from pipeline.errors import DataError, UserError
from pipeline.errors.causes import find_error
from pipeline.flags.precompute import make_parser
from pipeline.inputs import dataset
from pipeline.precompute import main
from pipeline.precomputing.options import resolve
from pipeline.precomputing.preflight import make_job
from pipeline.precomputing.store_session import open_session
from pipeline.storage.lock import writer_lock
from pipeline.store.metadata import published_lengths
from pipeline.store.reader import StoreReader
from pipeline.store.shards import shard_name
from pipeline.store.spec import SPEC_FILE, Spec
from tests.images import TRAIN_IMAGES, encoded_images
from tests.stores import DATASET, Asked, prepare_dataset, shard_files


def test_the_command_writes_the_store(
    asked: Asked, published_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Same bytes as without Beam; then repeated, extended, and refused for another spec."""
    assert main(asked.flags("--direct_num_workers=1")) == 0
    out = capsys.readouterr().out
    assert "51 views and evaluation crops of test (7), in 4 shards" in out
    assert f"store: {asked.store}: 51 views (3 epochs of 17 examples)" in out
    assert "codec float16: mean KL " in out
    assert "this run: 58 images in " in out
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
    with pytest.raises(DataError, match=r"seed: 1 .*0 "):
        main(asked.flags("--seed=1"))


def test_a_second_writer_is_refused_before_it_changes_anything(asked: Asked) -> None:
    asked.store.mkdir()
    with (
        writer_lock(asked.store),
        pytest.raises(UserError, match=f"process {os.getpid()} on "),
    ):
        main(asked.flags())
    assert [p.name for p in asked.store.iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("flag", "parts"),
    [
        ("--epoch=3", ["--epoch=3", "--epochs"]),
        ("--epochs=-1", ["--epochs", "-1"]),
        ("--codec=float8", ["float8", "bfloat16", "topk:"]),
        ("--teacher=nowhere", ["nowhere"]),
        ("--dataset=no_such_photos", ["no_such_photos"]),
        ("--split=nope", ["nope", DATASET, "test", "train"]),
        ("--split=train[:0]", ["train[:0]"]),
        ("--runner=NoRunner", ["--runner=NoRunner"]),
        ("--direct_num_worker=1", ["--direct_num_workers"]),
        ("--direct_running_mode=slow", ["--direct_running_mode"]),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_store(asked: Asked, flag: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        main(asked.flags(flag))
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (asked.store / SPEC_FILE).exists()


def test_a_data_set_in_another_format_is_refused(asked: Asked, tmp_path: Path) -> None:
    data = prepare_dataset(
        tmp_path / "tf", {"train": encoded_images(TRAIN_IMAGES[:2])}, file_format="tfrecord"
    )
    with pytest.raises(UserError, match=r"tfrecord .*--from_tfds="):
        main(asked.flags(f"--data_dir={data}"))


@pytest.mark.parametrize("text", ["", "{}", "not json"])
def test_a_garbled_spec_is_refused_and_kept(asked: Asked, text: str) -> None:
    asked.store.mkdir()
    (asked.store / SPEC_FILE).write_text(text)
    with pytest.raises(DataError, match=SPEC_FILE):
        main(asked.flags())
    assert (asked.store / SPEC_FILE).read_text() == text


@pytest.mark.parametrize("name", ["manifest.json", "dataset_info.json"])
def test_garbled_metadata_are_refused(asked: Asked, store: Path, name: str) -> None:
    (store / name).write_text("garbage")
    with pytest.raises(DataError, match=name):
        main(dataclasses.replace(asked, store=store).flags("--epochs=4"))


def test_a_swapped_teacher_or_data_set_does_not_continue_a_store(
    asked: Asked, store: Path, other_data_dir: Path, keras_teacher_path: Path
) -> None:
    before = shard_files(store)
    for changed, field in (
        (dataclasses.replace(asked, store=store, teacher=keras_teacher_path), "teacher.fingerprint"),
        (dataclasses.replace(asked, store=store, data_dir=other_data_dir), "dataset.fingerprint"),
    ):
        with pytest.raises(DataError, match=rf"{field}: \w+ .*\w+ .*{store}"):
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
    with pytest.raises(DataError, match=r"num_examples: 9 .*7 "):
        main(dataclasses.replace(asked, store=store, data_dir=data).flags())
    assert published_lengths(store / "eval") == before


def test_an_error_of_the_teacher_is_found_behind_beam(asked: Asked, breaking_teacher: Path) -> None:
    """A teacher fails in the middle: finished shards stay, whole epochs are published."""
    with pytest.raises(Exception, match="nan") as caught:
        main(dataclasses.replace(asked, teacher=breaking_teacher).flags())
    found = find_error(caught.value)
    assert isinstance(found, DataError)
    assert re.search(r"logit \d of (view|example) \d+.* is nan", str(found))
    assert "\n" not in str(found)
    assert published_lengths(asked.store) in ({}, {"views": [20]})
    assert not list(asked.store.rglob(".tmp-*"))
    with writer_lock(asked.store):  # free again
        pass


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
    assert lines[0].startswith(f"error: {asked.store}/{SPEC_FILE}: ")


def test_evaluated_slices_have_names_that_tfds_reads(
    asked: Asked, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The data set is opened only once for both splits and the worker."""
    opened, load_builder = [], dataset.load_builder
    monkeypatch.setattr(dataset, "load_builder", lambda *args: opened.append(args) or load_builder(*args))
    flags = asked.flags("--split=train[:12]", "--eval_splits=train[12:],test", "--epochs=1")
    assert main(flags) == 0
    assert len(opened) == 1
    assert "train[12:] (5 examples); test (7 examples)" in capsys.readouterr().out
    store = StoreReader(asked.store)
    assert store.eval_splits == store.held_out_splits == ["test", "train[12:]"]
    assert store.eval_reader("train[12:]").read(np.arange(5)).example.tolist() == [0, 1, 2, 3, 4]
    source = tfds.builder_from_directory(str(asked.store / "eval")).as_data_source("train_from_12")
    assert [int(record["example"]) for record in source] == [0, 1, 2, 3, 4]
    # Continued, verified, inspected and repaired as any other split.
    before = shard_files(asked.store)
    assert main(flags) == 0
    assert "nothing to do" in capsys.readouterr().out
    found = [f"--store={asked.store}", f"--data_dir={asked.data_dir}", f"--teacher={asked.teacher}"]
    assert verify.main([*found, "--fraction=1"]) == 0
    assert inspect.main(found[:1]) == 0
    out = capsys.readouterr().out
    assert "evaluation crops: 12 computed again, 0 with other parameters, 0 differing crops" in out
    assert "train[12:]" in out
    assert "unpublished" not in out
    (asked.store / "eval" / shard_name("train[12:]", 0)).unlink()
    assert main([*flags, "--repair"]) == 0
    assert shard_files(asked.store) == before
    # What overlaps the training split is named, and is not held out.
    assert main([*flags, "--eval_splits=train[10:]"]) == 0
    assert "2 of them in --split=train[:12]" in capsys.readouterr().out
    assert StoreReader(asked.store).held_out_splits == ["test", "train[12:]"]


def test_workers_get_absolute_paths_and_input_buffer_bytes(
    asked: Asked, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A worker may run in another directory, and 0 is a valid size."""
    monkeypatch.chdir(tmp_path)
    relative = {
        name: Path(os.path.relpath(getattr(asked, name), tmp_path))
        for name in ("data_dir", "teacher", "store")
    }
    flags, _ = make_parser().parse_known_args(Asked(**relative).flags("--input_buffer_bytes=0"))
    options = resolve(flags, is_demo=False)
    assert options.store == "new"
    asked.store.mkdir()
    with open_session(options.store) as session:
        job = make_job(session, options, {"test": options.spec.dataset}, input_buffer_bytes=7)
    assert (job.store, job.progress) == (str(asked.store), str(asked.store))
    for place in (job.data_dir, job.teacher):
        assert place is not None
        assert Path(place).is_absolute()
        assert Path(place).exists()
    assert job.input_buffer_bytes == 0
    assert job.eval_datasets == (options.spec.dataset,)
