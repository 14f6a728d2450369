"""Teachers of other classes than the data set's, and data sets without labels, through all commands.

The teachers have random weights: what is tested is that no figure needs a label that is not there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from pipeline import inspect, open_store, plan, precompute, sample_views, verify
from pipeline.cli.main import run_command
from pipeline.inputs.dataset import Dataset
from pipeline.inputs.teacher import Teacher
from pipeline.store.layout import ACCURACY_FILE, CLASSES_FILE
from pipeline.store.reader import StoreReader
from pipeline.store.spec import Spec
from tests import runs, stores
from tests.images import TEST_IMAGES, TRAIN_IMAGES, encoded_images
from trainer import compare, evaluate, train
from trainer import teacher as teacher_command

ANIMALS = ["ant", "bee", "cat", "dog", "eel"]
IMAGES = {"train": encoded_images(TRAIN_IMAGES), "test": encoded_images(TEST_IMAGES, seed=50)}


@pytest.fixture(scope="module")
def unlabeled_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images without a label feature; read-only."""
    return stores.prepare_dataset(tmp_path_factory.mktemp("unlabeled"), IMAGES, classes=0)


@pytest.fixture(scope="module")
def animals_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images with class names; read-only."""
    return stores.prepare_dataset(tmp_path_factory.mktemp("animals"), IMAGES, classes=ANIMALS)


@pytest.fixture(scope="module")
def wide_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,000 classes; read-only."""
    module = stores.PlainTeacher(1000)
    return stores.save_teacher(tmp_path_factory.mktemp("wide") / "teacher", module=module)


@pytest.fixture(scope="module")
def names_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,000 names, `kind 0` to `kind 999`."""
    path = tmp_path_factory.mktemp("names") / "names.txt"
    path.write_text("".join(f"kind {number}\n" for number in range(1000)))
    return path


def write_store(store: Path, data_dir: Path, teacher: Path, *extra: str) -> None:
    asked = stores.Asked(data_dir, teacher, store)
    assert precompute.main(asked.flags("--eval_splits=all", *extra)) == 0


def train_on(store: Path, workdir: Path, *extra: str) -> dict[str, Any]:
    argv = runs.arguments(store, workdir, None, "--steps=6", "--log_every=1", "--eval_every=3", *extra)
    assert train.main(argv) == 0
    result: dict[str, Any] = json.loads((workdir / "result.json").read_text())
    return result


@pytest.fixture(scope="module")
def wide_store(
    unlabeled_dir: Path, wide_teacher: Path, names_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """1,000 classes on images without labels, with class names; read-only."""
    store = tmp_path_factory.mktemp("wide_store") / "store"
    write_store(store, unlabeled_dir, wide_teacher, f"--class_names={names_file}")
    return store


def test_precompute_verify_and_inspect_need_no_labels(
    wide_store: Path,
    unlabeled_dir: Path,
    wide_teacher: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert StoreReader(wide_store).spec.num_classes == 1000
    assert not (wide_store / ACCURACY_FILE).exists()
    asked = stores.Asked(unlabeled_dir, wide_teacher, wide_store)
    assert precompute.main(asked.flags("--eval_splits=all")) == 0  # keeps the class names
    first, *rest = capsys.readouterr().out.splitlines()
    assert "1,000 classes" in first
    assert "no labels" in first
    assert not any("top-1" in line or "no labels" in line for line in rest)
    assert verify.main([f"--store={wide_store}", "--fraction=1"]) == 0
    page, figures = tmp_path / "page.html", tmp_path / "figures.json"
    assert inspect.main([f"--store={wide_store}", f"--html={page}", f"--json={figures}", "--views=2"]) == 0
    view = json.loads(figures.read_text())["gallery"][0]
    assert "names 1000" in capsys.readouterr().out
    assert view["own"]["label"] == "no label"
    assert view["teacher"][0]["class"].startswith("kind ")
    assert "own label" not in page.read_text()
    assert view["teacher"][0]["class"] in page.read_text()
    opened = open_store(wide_store)
    assert opened[0].label is None
    assert opened.class_names[999] == "kind 999"
    assert opened.show([0]).axes[0].get_title() == "view 0: no label"


def test_training_and_report_without_labels(
    wide_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = train_on(wide_store, tmp_path / "run")
    out = capsys.readouterr().out
    assert "1,000 classes" in out.splitlines()[0]
    assert out.count("no labels") == 1
    evaluation = result["evaluation"]["test"]
    assert evaluation["student_top1"] is evaluation["teacher_top1"] is None
    assert evaluation["unlabeled"] == 0
    assert 0 <= evaluation["agreement"] <= 1
    assert evaluation["distillation_loss"] > 0
    assert "no labels" in result["no_accuracy"]
    assert (tmp_path / "run" / "student_best").exists()
    exported = Teacher(tmp_path / "run" / "student", image_size=stores.SIZE)
    assert exported.num_classes == 1000
    # The student without its run, compared with the teacher instead of labels.
    page, figures = tmp_path / "page.html", tmp_path / "figures.json"
    argv = [f"--student={tmp_path / 'run' / 'student'}", f"--store={wide_store}"]
    assert evaluate.main([*argv, f"--html={page}", f"--json={figures}"]) == 0
    found = json.loads(figures.read_text())
    assert "no labels" in found["no_accuracy"]
    test = found["evaluation"]["test"]
    assert test["agreement"] == evaluation["agreement"]
    assert test["student_top1"] is test["calibration_error"] is None
    assert test["compared_with"] == "teacher"
    confused = test["confusions"]
    assert sum(each["images"] for each in confused) == round((1 - test["agreement"]) * test["examples"])
    assert all(each["expected"].startswith("kind ") for each in confused)
    assert "picture of 1,000 classes" in page.read_text()
    # The report of this run alone.
    argv = [f"--workdir={tmp_path / 'report'}", f"--from={tmp_path / 'run'}"]
    assert compare.main(argv) == 0
    compared = json.loads((tmp_path / "report" / "result.json").read_text())
    assert compared["teacher"]["top1"] is compared["runs"][0]["top1"] is None
    assert compared["classes"] == 1000
    page = (tmp_path / "report" / "report.html").read_text()
    assert "no labels" in page
    assert "teacher accuracy" not in page


@pytest.mark.slow
def test_a_comparison_without_labels(
    wide_store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    argv = [
        f"--store={wide_store}",
        f"--workdir={tmp_path}",
        "--student=tiny",
        "--batch_size=4",
        "--no-measure",
    ]
    assert compare.main([*argv, "--epochs=3", "--deterministic", "--arms=offline,online,fixed"]) == 0
    out = capfd.readouterr().out
    assert out.count("no labels") == 1
    result = json.loads((tmp_path / "result.json").read_text())
    pair = result["pairs"][0]
    assert (pair["agreement"], pair["top1_difference"], pair["top1_interval"]) == (1.0, None, None)
    assert pair["weights_distance_relative"] < 1e-3
    assert [arm["top1_mean"] for arm in result["arms"]] == [None] * 3
    assert all(arm["agreement_mean"] is not None for arm in result["arms"])
    assert "kind " in (tmp_path / "report.html").read_text()


def test_a_class_map_turns_accuracy_on(
    animals_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Seven classes stand for four of the five; one stands for nothing."""
    module = stores.PlainTeacher(7)
    teacher, store = stores.save_teacher(tmp_path / "t", module=module), tmp_path / "store"
    write_store(store, animals_dir, teacher)
    first = capsys.readouterr().out.splitlines()[0]
    for part in ("7 classes", "5", "--class_map"):
        assert part in first
    assert not (store / ACCURACY_FILE).exists()
    assert not (store / CLASSES_FILE).exists()
    run = train_on(store, tmp_path / "run")
    assert run["evaluation"]["test"]["teacher_top1"] is None
    # Added later, without computing a view again.
    path = tmp_path / "map.csv"
    path.write_text("0,ant\n1,ant\n2,bee\n3,bee\n5,eel\n6,dog\n")
    shards = stores.shard_files(store)
    capsys.readouterr()
    write_store(store, animals_dir, teacher, f"--class_map={path}")
    out = capsys.readouterr().out
    assert "6 of the teacher's 7 classes stand for 4 of the 5" in out.splitlines()[0]
    assert "1 have no teacher class" in out.splitlines()[0]
    assert stores.shard_files(store) == shards
    opened = StoreReader(store)
    logits = opened.eval_reader("test").read(np.arange(7)).logits
    mapped = np.array([0, 0, 1, 1, -1, 4, 3])
    logits[:, 4] = -np.inf
    answers = mapped[logits.argmax(axis=1)]
    top1 = float(np.mean(answers == np.arange(7) % 5))
    assert f"test {top1:.2%} of 7 images" in out
    mapped_run = train_on(store, tmp_path / "mapped_run")
    evaluation = mapped_run["evaluation"]["test"]
    assert evaluation["teacher_top1"] == pytest.approx(top1)
    assert evaluation["student_top1"] is not None
    assert evaluation["agreement"] == run["evaluation"]["test"]["agreement"]
    predictions = np.load(tmp_path / "mapped_run" / "predictions.npz")
    assert set(predictions["top1"]) <= {0, 1, 3, 4}
    assert np.mean(predictions["top1"] == predictions["labels"]) == evaluation["student_top1"]
    figures = tmp_path / "figures.json"
    argv = [f"--student={tmp_path / 'mapped_run' / 'student'}", f"--store={store}", f"--json={figures}"]
    assert evaluate.main(argv) == 0
    alone = json.loads(figures.read_text())["evaluation"]["test"]
    assert alone["student_top1"] == evaluation["student_top1"]
    assert {each["predicted"] for each in alone["confusions"]} <= {"ant", "bee", "dog", "eel"}
    # Another map replaces it, and the accuracy is measured again.
    path.write_text("4,2\n")
    write_store(store, animals_dir, teacher, f"--class_map={path}")
    assert f"test {1 / 7:.2%} of 7 images" in capsys.readouterr().out
    write_store(store, animals_dir, teacher)  # without the flag, the map stays
    assert f"test {1 / 7:.2%} of 7 images" in capsys.readouterr().out


def test_other_class_names_turn_accuracy_off(
    animals_dir: Path, teacher_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = tmp_path / "names.txt"
    names.write_text("\n".join(["ant", "bee", "cow", "dog", "eel"]))
    write_store(tmp_path / "store", animals_dir, teacher_path, f"--class_names={names}")
    out = capsys.readouterr().out
    for part in ("class 2", "'cow'", "'cat'"):
        assert part in out.splitlines()[0]
    assert "top-1" not in out
    names.write_text("\n".join(ANIMALS))
    write_store(tmp_path / "store", animals_dir, teacher_path, f"--class_names={names}")
    out = capsys.readouterr().out
    assert "no accuracy" not in out
    assert "teacher top-1: test " in out
    # Labels that are not to be used.
    write_store(tmp_path / "store", animals_dir, teacher_path, "--label_feature=none")
    assert "no labels" in capsys.readouterr().out.splitlines()[0]
    assert open_store(tmp_path / "store")[0].label is None


@pytest.mark.parametrize(
    ("flag", "content", "parts"),
    [
        ("class_names", "a\nb\n", ["2 names", "expected 5"]),
        ("class_map", "0,ant\nzebra,bee\n", ["line 1", "0"]),
        ("class_map", "0,ant\n9,bee\n", ["line 2", "9", "0 to 4"]),
        ("class_map", "0,ant\n1,zebra\n", ["line 2", "zebra", "'ant'"]),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    animals_dir: Path,
    teacher_path: Path,
    tmp_path: Path,
    flag: str,
    content: str,
    parts: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, store = tmp_path / "file", tmp_path / "store"
    path.write_text(content)
    argv = stores.Asked(animals_dir, teacher_path, store).flags(f"--{flag}={path}")
    code, line = runs.fail(argv, capsys, main=precompute.main)
    assert code == 2
    for part in (f"--{flag}={path}", *parts):
        assert part in line
    assert not (store / "spec.json").exists()


def test_a_class_map_without_labels_is_refused(
    unlabeled_dir: Path, teacher_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "map.csv").write_text("0,0\n")
    asked = stores.Asked(unlabeled_dir, teacher_path, tmp_path / "store")
    code, line = runs.fail(asked.flags(f"--class_map={tmp_path}/map.csv"), capsys, main=precompute.main)
    assert code == 2
    assert "no labels" in line


def test_fine_tuning_without_labels_is_refused(
    unlabeled_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["finetune", f"--dataset={stores.DATASET}", f"--data_dir={unlabeled_dir}", "--model=tiny"]
    argv += ["--image_size=24", "--steps=2", f"--output={tmp_path / 't'}", f"--workdir={tmp_path / 'run'}"]
    code, line = runs.fail(argv, capsys, main=teacher_command.main)
    assert code == 2
    for part in (stores.DATASET, "labels"):
        assert part in line
    assert not (tmp_path / "run").exists()


def test_a_plan_from_given_rates_takes_the_number_of_classes(
    unlabeled_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [f"--dataset={stores.DATASET}", f"--data_dir={unlabeled_dir}", "--teacher_rate=100"]
    assert plan.main([*argv, "--num_classes=1000"]) == 0
    assert "17 examples, 1,000 classes" in capsys.readouterr().out
    code, line = runs.fail(argv, capsys, main=plan.main)
    assert code == 2
    assert "--num_classes" in line


@pytest.mark.slow
def test_an_output_by_name_is_found_again(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also by `verify --teacher`, and online past the end of the store."""
    module, store = stores.PlainTeacher(7), tmp_path / "store"

    def call(image: tf.Tensor) -> dict[str, tf.Tensor]:
        scores = module(image)
        return {"coarse": scores[:, :3], "fine": scores}

    teacher = stores.save_teacher(tmp_path / "t", call, module=module)
    asked = stores.Asked(data_dir, teacher, store)
    code, line = runs.fail(asked.flags(), capsys, main=precompute.main)
    assert code == 2
    for part in ("coarse", "fine", "--teacher_output="):
        assert part in line
    argv = asked.flags("--teacher_output=fine", "--codec=float32")
    planned = [flag for flag in argv if not flag.startswith(("--runner", "--store"))]
    assert plan.main([*planned, "--calibrate_seconds=0.1"]) == 0
    assert "7 classes" in capsys.readouterr().out
    assert precompute.main(argv) == 0
    spec = Spec.load(store)
    assert (spec.teacher.output, spec.num_classes) == ("fine", 7)
    with pytest.raises(SystemExit) as refused:
        run_command(precompute.main, asked.flags("--teacher_output=coarse", "--codec=float32"))
    assert refused.value.code == 3
    assert "teacher.output: coarse asked for, fine in" in capsys.readouterr().err
    assert verify.main([f"--store={store}", f"--teacher={teacher}", "--fraction=1"]) == 0
    argv = runs.arguments(store, tmp_path / "run", None, f"--teacher={teacher}", "--epochs=4", "--write_back")
    assert train.main(argv) == 0
    assert StoreReader(store).epochs == 4
    assert verify.main([f"--store={store}", "--fraction=1"]) == 0


@pytest.mark.slow
def test_an_image_feature_by_name_is_found_again(
    tmp_path: Path, teacher_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, store = tmp_path / "data", tmp_path / "store"
    stores.prepare_dataset(data, IMAGES, second_image=True)
    asked = stores.Asked(data, teacher_path, store)
    code, line = runs.fail(asked.flags(), capsys, main=precompute.main)
    assert code == 2
    for part in ("image, second", "--image_feature="):
        assert part in line
    write_store(store, data, teacher_path, "--image_feature=second")
    spec = Spec.load(store)
    assert spec.dataset.image_feature == "second"
    with pytest.raises(SystemExit) as refused:
        run_command(precompute.main, asked.flags("--image_feature=image"))
    assert refused.value.code == 3
    assert "dataset.image_feature: image asked for, second in" in capsys.readouterr().err
    assert verify.main([f"--store={store}", "--fraction=1"]) == 0
    opened = open_store(store)
    examples = np.array([opened[0].example])
    first = Dataset(stores.DATASET, "train", data_dir=data, image_feature="image")
    assert opened.dataset.read(examples) == first.read(len(IMAGES["train"]) - 1 - examples)
    assert train_on(store, tmp_path / "run")["evaluation"]["test"]["student_top1"] is not None
    (drawn,) = sample_views(
        [3], dataset=stores.DATASET, data_dir=data, image_feature="second", policy=spec.policy
    )
    np.testing.assert_array_equal(drawn.mixed, opened[3].mixed)
