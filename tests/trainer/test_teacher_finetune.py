"""trainer.teacher: the command `finetune`."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from pipeline.cli.main import run_command
from pipeline.inputs.teacher import Teacher
from pipeline.inputs.teacher_checks import trial_crops
from pipeline.storage.lock import writer_lock
from tests import stores
from tests.images import TEST_IMAGES, TRAIN_IMAGES, encoded_images
from tests.teachers import COLORS, convert_arguments, fail, finetune_arguments, losses, weights_of
from trainer.run.callbacks import RunCallback
from trainer.teacher import main

pytestmark = pytest.mark.usefixtures("bit_small")


def result(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "run" / "result.json").read_text())


@pytest.mark.parametrize("policy", ["light", "inception"])
def test_finetuning_learns_and_writes_a_teacher(colors_dir: Path, tmp_path: Path, policy: str):
    assert main(finetune_arguments(colors_dir, tmp_path, "--steps=60", f"--policy={policy}")) == 0
    found = losses(tmp_path)
    assert len(found) == 60
    assert np.mean(found[-5:]) < 0.5 * found[0]
    assert result(tmp_path)["top1"]["test"] >= 0.8
    teacher = Teacher(tmp_path / "teacher", image_size=24, num_classes=stores.CLASSES)
    teacher.check_rows(trial_crops(4, 24))
    red = np.full((1, 24, 24, 3), [250, 20, 20], np.uint8)
    logits = teacher.logits(tf.constant(red), tf.constant([0]), tf.ones(1))
    assert logits.argmax() == 0


def test_interrupted_run_ends_like_an_uninterrupted_one(
    colors_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deterministic: None
):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    main(finetune_arguments(colors_dir, whole, "--steps=7"))
    original = RunCallback.on_train_batch_end
    for stop in (3, 6):

        def interrupt(self: RunCallback, batch: int, logs: Any = None, *, stop: int = stop) -> None:
            original(self, batch, logs)
            if self.step == stop:
                raise KeyboardInterrupt

        monkeypatch.setattr(RunCallback, "on_train_batch_end", interrupt)
        with pytest.raises(SystemExit) as exit_info:
            run_command(main, finetune_arguments(colors_dir, cut, "--steps=7", "--checkpoint_every=2"))
        assert exit_info.value.code == 130
        assert not (cut / "teacher").exists()
    monkeypatch.setattr(RunCallback, "on_train_batch_end", original)
    main(finetune_arguments(colors_dir, cut, "--steps=7", "--checkpoint_every=2"))
    assert result(cut)["first_step"] == 6
    assert losses(cut) == losses(whole)
    for ours, theirs in zip(weights_of(cut / "teacher"), weights_of(whole / "teacher"), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_finished_run_changes_nothing_and_prints_its_figures(
    colors_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    argv = finetune_arguments(colors_dir, tmp_path, "--steps=2")
    main(argv)
    first = capsys.readouterr().out
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    main(argv)
    # Above all the teacher, because stores identify it by its fingerprint.
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert capsys.readouterr().out.splitlines()[-2:] == first.splitlines()[-2:]


def test_finished_run_whose_teacher_is_gone_is_evaluated_and_exported_again(colors_dir: Path, tmp_path: Path):
    main(finetune_arguments(colors_dir, tmp_path, "--steps=2"))
    before = weights_of(tmp_path / "teacher")
    shutil.rmtree(tmp_path / "teacher")
    main(finetune_arguments(colors_dir, tmp_path, "--steps=2"))
    assert result(tmp_path)["first_step"] == 2
    for ours, theirs in zip(weights_of(tmp_path / "teacher"), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_workdir_inside_the_output_which_is_replaced_is_refused(
    colors_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    flags = (f"--output={tmp_path}/teacher", f"--workdir={tmp_path}/teacher/run")
    code, line = fail(finetune_arguments(colors_dir, tmp_path, *flags), capsys)
    assert code == 2
    assert f"--workdir={tmp_path}/teacher/run" in line
    assert f"--output={tmp_path}/teacher" in line


def test_data_set_without_a_held_out_split_is_named_before_the_first_step(
    colors_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    main(finetune_arguments(colors_dir, tmp_path, "--steps=1", "--split=train+test"))
    out = capsys.readouterr().out
    assert result(tmp_path)["top1"] == {}
    for line in (out.splitlines()[-2], *[line for line in out.splitlines() if "no accuracy" in line]):
        assert "train+test" in line


def test_run_with_other_flags_is_not_continued(
    colors_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    main(finetune_arguments(colors_dir, tmp_path, "--steps=2"))
    code, line = fail(finetune_arguments(colors_dir, tmp_path, "--steps=3", "--policy=inception"), capsys)
    assert code == 2
    assert re.search("steps.*3.*2", line)
    assert re.search(r"policy\.name.*inception.*light", line)


def test_other_initial_weights_do_not_continue_a_run(
    colors_dir: Path, tmp_path: Path, npz: Path, capsys: pytest.CaptureFixture[str]
):
    extra = ["--steps=1", "--image_size=33"]
    main(finetune_arguments(colors_dir, tmp_path, *extra, network="--model=bit_small"))
    argv = finetune_arguments(colors_dir, tmp_path, *extra, f"--init={npz}", network="--model=bit_small")
    code, line = fail(argv, capsys)
    assert code == 2
    assert re.search("init.*[0-9a-f]{64}.*None", line)


def test_second_run_in_a_work_directory_is_refused(
    colors_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "run").mkdir()
    with writer_lock(tmp_path / "run", flag="--workdir"):
        code, line = fail(finetune_arguments(colors_dir, tmp_path), capsys)
    assert code == 2
    assert f"process {os.getpid()}" in line


def test_split_without_another_to_evaluate_on_is_reported(
    colors_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    main(finetune_arguments(colors_dir, tmp_path, "--steps=1", "--split=test"))
    assert result(tmp_path)["top1"] == {}
    line = capsys.readouterr().out.splitlines()[-2]
    assert all(text in line for text in (f"{COLORS}:1.0.0", "validation", "test"))


@pytest.mark.parametrize(
    ("network", "extra", "message"),
    [
        ("--model=vgg", [], "--model=vgg.*resnet50v2"),
        ("--seed=1", [], "--model.*--teacher.*neither"),
        ("--model=tiny", ["--teacher=/none"], "--model.*--teacher.*both"),
        ("--teacher=/none", [], "--teacher=/none"),
        ("--teacher=/none", ["--init=/none"], "--init=/none.*--model"),
        ("--model=tiny", ["--init=a.npz"], "--init=a.npz.*--model=tiny"),
        ("--model=bit_small", ["--init=/none.npz"], "/none.npz"),
        ("--model=tiny", ["--init=/none"], "--init=/none"),
        ("--teacher=/none", ["--teacher_value_range=0..2"], r"0\.\.2.*0\.\.255"),
        ("--model=tiny", ["--steps=0"], "--steps: 0"),
        ("--model=tiny", ["--learning_rate=-1"], "--learning_rate: -1"),
        ("--model=tiny", ["--policy=heavy"], "--policy=heavy.*inception, light"),
        ("--model=tiny", ["--recipe=soup"], "--recipe=soup.*keras_example"),
        ("--model=tiny", ["--workdir=/etc/passwd"], "--workdir=/etc/passwd"),
        ("--model=tiny", ["--output=/etc/passwd/t"], "--output=/etc/passwd"),
        ("--model=tiny", ["--split=dev"], "--split=dev.*test, train"),
        ("--model=tiny", ["--dataset=nothing"], "--dataset=nothing"),
        ("--model=tiny", ["--step=3"], "--step=3.*--steps"),
        ("--model=tiny", ["--label_feature=none"], "--label_feature=none.*labels"),
        ("--model=tiny", ["--label_feature=kind"], "--label_feature=kind.*label"),
    ],
)
def test_mistakes_in_finetune_exit_2(
    colors_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    network: str,
    extra: list[str],
    message: str,
):
    code, line = fail(finetune_arguments(colors_dir, tmp_path, *extra, network=network), capsys)
    assert code == 2
    assert re.search(message, line)
    assert not (tmp_path / "teacher").exists()


def test_directory_of_something_else_is_left_alone(
    colors_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "run" / ".tmp-mine").mkdir(parents=True)
    code, line = fail(finetune_arguments(colors_dir, tmp_path), capsys)
    assert code == 2
    assert f"{tmp_path}/run" in line
    assert ".tmp-mine" in line
    assert (tmp_path / "run" / ".tmp-mine").exists()


def test_teachers_that_cannot_be_finetuned_exit_2(
    colors_dir: Path,
    tmp_path: Path,
    teacher_path: Path,
    keras_teacher_path: Path,
    npz: Path,
    capsys: pytest.CaptureFixture[str],
):
    layers = tf.keras.layers
    pool = tf.keras.Sequential([layers.Input([24, 24, 3]), layers.GlobalAveragePooling2D(name="last")])
    pool.save(tmp_path / "pool.keras")
    main(convert_arguments(npz, tmp_path / "bit"))
    for network, extra, message in (
        (f"--teacher={teacher_path}", [], f"--teacher={teacher_path}.*Keras"),
        (f"--teacher={colors_dir}", [], f"--teacher={colors_dir}.*SavedModel"),
        (f"--teacher={npz}", [], f"--teacher={npz}.*SavedModel"),
        (f"--teacher={tmp_path}/pool.keras", [], "last.*GlobalAveragePooling2D.*Dense"),
        (
            f"--teacher={keras_teacher_path}",
            ["--image_size=20"],
            r"\(None, 24, 24, 3\).*\(None, 20, 20, 3\).*--image_size",
        ),
        ("--model=small", [f"--init={keras_teacher_path}"], r"--init.*none of its 4 arrays.*small"),
        ("--model=tiny", [f"--init={tmp_path}/bit"], r"--init.*none of its \d+ arrays.*tiny"),
    ):
        code, line = fail(finetune_arguments(colors_dir, tmp_path, *extra, network=network), capsys)
        assert code == 2
        assert re.search(message, line), line


def test_damaged_image_exits_3_and_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    image = tf.io.encode_png(np.full((30, 30, 3), 9, np.uint8)).numpy()
    splits = {"train": [image, image, image[:60], image], "test": [image]}
    data_dir = stores.prepare_dataset(tmp_path / "data", splits, name=COLORS)
    code, line = fail(finetune_arguments(data_dir, tmp_path, "--image_cache_bytes=0"), capsys)
    assert code == 3
    assert "example 2" in line
    assert "60 bytes" in line


def test_training_split_without_labels_exits_2_with_a_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    images = {"train": encoded_images(TRAIN_IMAGES)}
    data_dir = stores.prepare_dataset(tmp_path / "data", images, name=COLORS, unlabeled=range(3, stores.N))
    code, line = fail(finetune_arguments(data_dir, tmp_path, "--steps=5"), capsys)
    assert code == 2
    assert re.search(rf"--split=train.*example \d+ of {COLORS}:1\.0\.0", line)


def test_embedded_default_needs_no_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    argv = ["finetune", "--model=tiny", "--steps=2", "--batch_size=8"]
    main([*argv, f"--output={tmp_path}/teacher", f"--workdir={tmp_path}/run"])
    assert "5,000 MNIST digits" in capsys.readouterr().out
    Teacher(tmp_path / "teacher", image_size=32, num_classes=10)


def test_features_of_a_data_set_with_several_are_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    images = {"train": encoded_images(TRAIN_IMAGES), "test": encoded_images(TEST_IMAGES)}
    data_dir = stores.prepare_dataset(tmp_path / "data", images, name=COLORS, second_image=True)
    short = ("--steps=1", "--batch_size=4")
    code, line = fail(finetune_arguments(data_dir, tmp_path / "none", *short), capsys)
    assert code == 2
    assert "--image_feature=image" in line
    found = {}
    for feature in ("image", "second"):
        argv = finetune_arguments(
            data_dir, tmp_path / feature, *short, f"--image_feature={feature}", "--label_feature=label"
        )
        main(argv)
        (found[feature],) = losses(tmp_path / feature)
    assert found["image"] != found["second"]
    code, line = fail([argument for argument in argv if "label_feature" not in argument], capsys)
    assert code == 2
    assert "label_feature" in line
