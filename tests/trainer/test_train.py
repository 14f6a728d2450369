"""trainer.train: files of a complete run, and repeated commands on a finished run."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from pipeline.errors import EXIT_DATA_ERROR, EXIT_USER_ERROR, UserError
from pipeline.inputs import dataset
from pipeline.inputs.dataset import Dataset
from pipeline.inputs.teacher import Teacher
from pipeline.inputs.teacher_checks import trial_crops
from pipeline.precomputing.worker import ShardWorker
from pipeline.storage.lock import writer_lock
from pipeline.store.reader import StoreReader
from tests import stores
from tests.images import TEST_IMAGES, TRAIN_IMAGES, encoded_images
from tests.runs import (
    arguments,
    assert_same_weights,
    checkpoint_weights,
    environment,
    fail,
    losses,
    metrics,
    run_process,
    start_run,
)
from tests.trainer.conftest import MakeStore
from trainer.comparison.finished import FinishedRun
from trainer.comparison.summary import arm_rows
from trainer.train import main

STEPS = 3 * stores.N // 5

# Uses the exported student with TensorFlow alone.
SERVE = """
import sys
import numpy as np
import tensorflow as tf
images = np.load(sys.argv[2])
student = tf.saved_model.load(sys.argv[1])
(logits,) = student.signatures["serving_default"](image=tf.constant(images)).values()
np.save(sys.argv[3], logits.numpy())
assert not {"trainer", "pipeline", "tensorflow_addons"} & set(sys.modules)
"""


class Finished:
    """A run of the command in its own process."""

    def __init__(self, argv: list[str], workdir: Path) -> None:
        self.argv, self.workdir = argv, workdir
        self.done = run_process(argv, "-X", "importtime")

    def read(self, name: str) -> dict[str, Any]:
        return json.loads((self.workdir / name).read_text())


@pytest.fixture(scope="module")
def finished(published_store: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    workdir = tmp_path_factory.mktemp("finished") / "deep" / "run"
    return Finished(arguments(published_store, workdir, data_dir, "--log_every=3", "--seed=4"), workdir)


def test_process_never_imports_beam_nor_the_precompute(finished: Finished):
    imported = [line.rsplit("|", 1)[1].strip() for line in finished.done.stderr.splitlines() if "|" in line]
    assert "trainer.step.optimizers" in imported
    assert [name for name in imported if name.startswith(("apache_beam", "pipeline.precompute"))] == []


def test_result_has_training_and_evaluation(finished: Finished, published_store: Path):
    result = finished.read("result.json")
    store = StoreReader(published_store)
    assert result["steps"] == STEPS
    assert result["first_step"] == 0
    assert result["epochs"] == STEPS * 5 / stores.N
    assert result["teacher_forward_passes"] == 0
    assert result["spec"] == store.spec.digest()
    assert result["student"] == "tiny"
    assert result["store_bytes"] == sum(path.stat().st_size for path in published_store.glob("views.array*"))
    assert result["seconds"] > 0
    test = result["evaluation"]["test"]
    assert list(result["evaluation"]) == ["test"]
    assert test == {key: metrics(finished.workdir, "eval_test")[-1][key] for key in test}
    assert f"teacher {test['teacher_top1']:.2%}" in finished.done.stdout


def test_best_student_is_exported_with_its_evaluation(finished: Finished):
    best, lines = finished.read("result.json")["best"], metrics(finished.workdir, "eval_test")
    assert best["split"] == "test"
    (line,) = [line for line in lines if line["step"] == best["step"]]
    assert {**line, "split": "test"} == {**best, "kind": "eval_test"}
    tops = [line["student_top1"] for line in lines]
    assert best["step"] == 1 + tops.index(max(tops))
    kept = checkpoint_weights(finished.workdir, "checkpoints/best")
    exported = tf.saved_model.load(str(finished.workdir / "student_best")).variables
    weights = {name: value for name, value in kept.items() if name.startswith("student/")}
    assert len(exported) == len([name for name in weights if "OPTIMIZER_SLOT" not in name])
    for variable in exported:
        assert any(np.array_equal(variable.numpy(), value) for value in weights.values()), variable.name


def test_predictions_are_written_with_the_labels(finished: Finished):
    test = finished.read("result.json")["evaluation"]["test"]
    with np.load(finished.workdir / "predictions.npz") as kept:
        top1, labels = kept["top1"], kept["labels"]
    assert top1.dtype == labels.dtype == np.int32
    assert labels.tolist() == [index % stores.CLASSES for index in range(test["examples"])]
    assert (top1 == labels).mean() == test["student_top1"]


def test_left_over_views_are_reported(finished: Finished):
    assert "the last 1 view" in finished.done.stdout


def test_config_has_the_flags(finished: Finished, published_store: Path):
    config = finished.read("config.json")
    assert config["flags"]["store"] == str(published_store)
    assert config["flags"]["seed"] == 4
    assert config["recipe"]["student"] == "tiny"
    assert config["length"]["steps"] == STEPS


def test_metrics_have_every_log_step_once(finished: Finished):
    assert list(losses(finished.workdir)) == [3, 6, 9, 10]
    assert [line["step"] for line in metrics(finished.workdir, "eval_test")] == list(range(1, STEPS + 1))


def test_tensorboard_file_is_there(finished: Finished):
    (events,) = (finished.workdir / "tensorboard").glob("events.out.tfevents.*")
    assert events.stat().st_size > 100


def test_exported_student_serves_the_trained_student_s_logits_without_our_code(
    finished: Finished, tmp_path: Path
):
    generator = np.random.default_rng(0)
    images = generator.uniform(0, 255, (6, stores.SIZE, stores.SIZE, 3)).astype(np.float32)
    np.save(tmp_path / "images.npy", images)
    done = subprocess.run(
        [sys.executable, "-c", SERVE, finished.workdir / "student", "images.npy", "logits.npy"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    run = start_run(finished.argv)
    fresh = run.student(images, training=False).numpy()
    assert run.checkpoints.restore() == STEPS
    trained = run.student(images, training=False).numpy()
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), trained, rtol=1e-5, atol=1e-6)
    assert np.abs(trained - fresh).max() > 1e-2


def test_exported_student_can_be_a_teacher(finished: Finished):
    teacher = Teacher(finished.workdir / "student", image_size=stores.SIZE, num_classes=stores.CLASSES)
    teacher.check_rows(trial_crops(4, stores.SIZE))


def test_checkpoint_is_restored_once_by_a_continued_run_and_never_by_a_finished_one(
    finished: Finished, teacher_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    workdir = Path(shutil.copytree(finished.workdir, tmp_path / "run"))
    restored: list[str] = []
    original = tf.train.Checkpoint.restore

    def restore(self: tf.train.Checkpoint, path: str, *args: Any) -> Any:
        restored.append(path)
        return original(self, path, *args)

    monkeypatch.setattr(tf.train.Checkpoint, "restore", restore)
    argv = [*finished.argv, f"--workdir={workdir}", "--eval_every=5"]
    assert main(argv) == 0
    assert restored == []
    assert main([*argv, "--steps=11", f"--teacher={teacher_path}"]) == 0
    # Once to continue; once more after the best student was exported.
    assert [Path(path).name for path in restored] == ["ckpt-10"] + ["ckpt-11"] * (len(restored) - 1)
    assert len(restored) <= 2


def test_finished_run_is_not_repeated(finished: Finished, capsys: pytest.CaptureFixture[str]):
    before = {name: (finished.workdir / name).read_bytes() for name in ("result.json", "metrics.jsonl")}
    assert main(finished.argv) == 0
    out = capsys.readouterr().out
    assert "nothing to do" in out
    assert "test: student " in out
    assert before == {name: (finished.workdir / name).read_bytes() for name in before}


def test_workdir_that_holds_something_else_is_refused_and_left_alone(
    published_store: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    thesis = tmp_path / "student" / "thesis.txt"
    thesis.parent.mkdir()
    thesis.write_text("mine")
    code, message = fail(arguments(published_store, tmp_path, data_dir), capsys)
    assert code == EXIT_USER_ERROR
    assert f"--workdir={tmp_path}" in message
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [thesis]
    code, message = fail(arguments(published_store, published_store, data_dir), capsys)
    assert code == EXIT_USER_ERROR


def test_second_trainer_in_a_workdir_is_refused(finished: Finished):
    with (
        writer_lock(finished.workdir, flag="--workdir"),
        pytest.raises(UserError, match=f"--workdir={finished.workdir}: .*process {os.getpid()}"),
    ):
        main(finished.argv)


def test_nothing_temporary_is_left(finished: Finished):
    assert sorted(path.name for path in finished.workdir.iterdir()) == [
        ".lock",  # empty, unless a run holds it
        "checkpoints",
        "config.json",
        "metrics.jsonl",
        "predictions.npz",
        "result.json",
        "student",
        "student_best",
        "tensorboard",
    ]


def test_finished_run_repeated_trains_nothing_and_a_refused_one_changes_nothing(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    workdir = Path(shutil.copytree(finished.workdir, tmp_path / "run"))
    again = [flag for flag in finished.argv if not flag.startswith("--workdir")] + [f"--workdir={workdir}"]
    before = checkpoint_weights(workdir)
    lines, config = (workdir / "metrics.jsonl").read_text(), (workdir / "config.json").read_text()
    code, message = fail([*again, "--batch_size=6"], capsys)
    assert code == EXIT_USER_ERROR
    assert "batch_size: 6 asked for, 5 in the checkpoint" in message
    assert (workdir / "config.json").read_text() == config
    code, message = fail([*again, "--steps=9"], capsys)
    assert code == EXIT_USER_ERROR
    assert "step 10" in message
    assert "9" in message
    assert (workdir / "config.json").read_text() == config
    assert main(again) == 0
    after = checkpoint_weights(workdir)
    assert_same_weights([after[name] for name in before], list(before.values()))
    assert (workdir / "metrics.jsonl").read_text() == lines


def test_checkpoint_of_another_store_is_refused(
    finished: Finished,
    make_store: MakeStore,
    data_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    other = make_store("other_seed", epochs=1, seed=1)
    workdir = Path(shutil.copytree(finished.workdir, tmp_path / "run"))
    code, message = fail(arguments(other, workdir, data_dir, "--seed=4", "--steps=3"), capsys)
    assert code == EXIT_DATA_ERROR
    assert f"spec: {StoreReader(other).spec.digest()} asked for, " in message
    assert f"{finished.read('result.json')['spec']} in the checkpoint" in message


def test_teacher_that_a_continued_run_no_longer_needs_is_not_loaded(
    one_epoch: Path,
    three_epochs: Path,
    data_dir: Path,
    teacher_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    """The command stays valid when the store grows. A new run that does not need the teacher is refused."""
    flags = (f"--teacher={teacher_path}", "--steps=4")
    code, message = fail(arguments(three_epochs, tmp_path / "new", data_dir, *flags), capsys)
    assert code == EXIT_USER_ERROR
    assert f"--teacher={teacher_path}" in message
    assert main(arguments(one_epoch, tmp_path / "run", data_dir, *flags)) == 0
    run = start_run(arguments(three_epochs, tmp_path / "run", data_dir, *flags))
    assert run.teachers is None
    assert "is not needed" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"teacher.*=nowhere"):
        start_run(arguments(three_epochs, tmp_path / "run", data_dir, "--teacher=nowhere", "--steps=4"))


def test_probable_mistakes_can_be_allowed_by_flags(three_epochs: Path, data_dir: Path, tmp_path: Path):
    mismatch, short = ["--recipe=demo", "--allow_recipe_mismatch"], ["--warmup_steps=99", "--allow_short_run"]
    argv = arguments(three_epochs, tmp_path, data_dir, "--steps=2", "--log_every=1", *mismatch, *short)
    start_run(argv).train()
    assert list(losses(tmp_path)) == [1, 2]


def test_split_without_labels_is_evaluated_without_accuracy(
    tmp_path: Path, teacher_path: Path, capsys: pytest.CaptureFixture[str]
):
    """The best student is then the one with the highest agreement."""
    images = {"train": encoded_images(TRAIN_IMAGES), "test": encoded_images(TEST_IMAGES, seed=50)}
    data_dir = stores.prepare_dataset(tmp_path / "data", images, unlabeled=range(stores.N))
    spec, store = stores.make_spec(data_dir, teacher_path), tmp_path / "store"
    stores.write_store(ShardWorker(stores.job_for(store, spec, data_dir, teacher_path)), epochs=1)
    argv = arguments(store, tmp_path / "run", data_dir, "--eval_every=1")
    assert main(argv) == 0
    assert "7 of 7 images" in capsys.readouterr().out
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    figures = result["evaluation"]["test"]
    assert (figures["unlabeled"], figures["student_top1"], figures["teacher_top1"]) == (7, None, None)
    history = metrics(tmp_path / "run", "eval_test")
    assert result["best"]["agreement"] == max(line["agreement"] for line in history)
    row = FinishedRun.load(tmp_path / "run").to_json(relative_to=tmp_path)
    assert (row["top1"], arm_rows([row])[0]["top1_mean"]) == (None, None)


def test_slice_of_the_training_split_is_evaluated_under_its_name(
    tmp_path: Path,
    data_dir: Path,
    teacher_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    part = Dataset(stores.DATASET, "train[:12]", data_dir=data_dir)
    spec = dataclasses.replace(stores.make_spec(data_dir, teacher_path), dataset=part.identity())
    store, workdir = tmp_path / "store", tmp_path / "run"
    worker = ShardWorker(stores.job_for(store, spec, data_dir, teacher_path))
    stores.write_store(worker, epochs=1, eval_splits=("train[12:]", "train"))
    argv = arguments(store, workdir, data_dir)
    opened, load_builder = [], dataset.load_builder
    monkeypatch.setattr(dataset, "load_builder", lambda *args: opened.append(args) or load_builder(*args))
    assert main(argv) == 0
    assert len(opened) == 1  # the data set, for views and evaluation
    result = json.loads((workdir / "result.json").read_text())
    assert result["eval_split"] == "train[12:]"
    assert list(result["evaluation"]) == ["train[12:]"]  # not the whole split
    assert result["evaluation"]["train[12:]"]["examples"] == 5
    last = metrics(workdir, "eval_train[12:]")[-1]
    assert last.items() >= FinishedRun.load(workdir).evaluation.items()
    capsys.readouterr()
    assert main(argv) == 0
    assert "nothing to do" in capsys.readouterr().out
