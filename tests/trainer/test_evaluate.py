"""trainer.evaluate: any saved model, with the figures of the training, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from pipeline.pages.figures import look_up
from pipeline.precomputing.worker import ShardWorker
from pipeline.store.combination import open_stores
from pipeline.store.spec import Spec
from pipeline.views.policies.light import Light
from tests import runs, stores, students
from tests.images import TEST_IMAGES, encoded_images
from tests.pages import Reader
from trainer import evaluate, train
from trainer.pages.evaluation_page import render_evaluation
from trainer.run.evaluation import Evaluator
from trainer.run.predictions import Predictions

LARGE = 32
ANSWERS = ("student_top1", "teacher_top1", "agreement")


@pytest.fixture(scope="module")
def run(published_store: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of 3 steps; read-only."""
    workdir = tmp_path_factory.mktemp("run") / "run"
    argv = runs.arguments(published_store, workdir, data_dir, f"--student={students.MINIMAL}", "--epochs=1")
    assert train.main(argv) == 0
    return workdir


@pytest.fixture(scope="module")
def keras_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher as a `.keras` file; read-only."""
    path = tmp_path_factory.mktemp("keras_file") / "teacher.keras"
    stores.keras_teacher().save(path)
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models that are refused, or that take images of another size; read-only."""
    root = tmp_path_factory.mktemp("models")
    layers = tf.keras.layers

    def save(name: str, *others: Any, size: int | None = stores.SIZE, classes: int = stores.CLASSES) -> None:
        image = tf.keras.Input([size, size, 3])
        x = layers.GlobalAveragePooling2D()(layers.Conv2D(3, 3)(image))
        x = layers.Dense(classes)(x)
        for layer in others:
            x = layer(x)
        tf.keras.Model(image, x).save(root / f"{name}.keras")

    save("classes", classes=7)
    save("softmax", layers.Softmax())
    save("large", size=LARGE)
    save("any_size", size=None)
    save("nan", layers.Rescaling(float("nan")))
    batch = {"image": tf.TensorSpec([4, stores.SIZE, stores.SIZE, 3], tf.float32)}
    stores.save_teacher(root / "batches_of_4", inputs=batch)
    flat = {"image": tf.TensorSpec([None, stores.SIZE, stores.SIZE], tf.float32)}
    stores.save_teacher(
        root / "flat", lambda image: {"logits": image[:, 0, :5]}, module=tf.Module(), inputs=flat
    )
    (root / "weights.h5").write_bytes(b"")
    (root / "broken.keras").write_bytes(b"no zip")
    (root / "empty").mkdir()
    return root


def evaluated(tmp_path: Path, student: Path, *flags: str) -> dict[str, Any]:
    """The result of the command."""
    path = tmp_path / "figures.json"
    assert evaluate.main([f"--student={student}", f"--json={path}", *flags]) == 0
    return json.loads(path.read_text())


def test_figures_of_an_exported_student_are_those_of_its_run(
    run: Path, published_store: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = json.loads((run / "result.json").read_text())["evaluation"]["test"]
    given = (f"--store={published_store}", f"--data_dir={data_dir}")
    found = evaluated(tmp_path, run / "student", *given)
    test = found["evaluation"]["test"]
    assert {name: test[name] for name in expected} == expected | {
        "distillation_loss": test["distillation_loss"]
    }
    assert test["distillation_loss"] == pytest.approx(expected["distillation_loss"], rel=1e-6)
    out = capsys.readouterr().out
    assert f"{expected['agreement']:.2%}" in out
    assert f"{expected['distillation_loss']:.4f}" in out
    assert str(run / "config.json") in out
    # Elsewhere, the run is not known.
    copied = shutil.copytree(run / "student", tmp_path / "elsewhere")
    plain = evaluated(tmp_path, Path(copied), *given)
    assert (plain["temperature"], plain["temperature_squared"]) == (2.0, False)
    squared = 2.0**2 if found["temperature_squared"] else 1.0
    assert found["temperature_squared"]
    assert plain["evaluation"]["test"]["distillation_loss"] * squared == pytest.approx(
        test["distillation_loss"], rel=1e-5
    )
    asked = evaluated(tmp_path, run / "student", *given, "--no-temperature_squared", "--split=test")
    assert asked["evaluation"] == plain["evaluation"]


def test_damaged_config_of_the_run_is_named_unless_the_flags_replace_it(
    run: Path, published_store: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run / "student", tmp_path / "run" / "student")
    (tmp_path / "run" / "config.json").write_text("{}")
    student, given = tmp_path / "run" / "student", [f"--store={published_store}", f"--data_dir={data_dir}"]
    code, line = runs.fail([f"--student={student}", *given], capsys, main=evaluate.main)
    assert code == 2
    assert str(tmp_path / "run" / "config.json") in line
    assert "--temperature" in line
    found = evaluated(tmp_path, student, *given, "--temperature=2", "--temperature_squared")
    assert (found["temperature"], found["temperature_squared"], found["loss_of"]) == (2.0, True, None)


def test_every_kind_of_saved_model_has_the_same_figures(
    published_store: Path,
    data_dir: Path,
    teacher_path: Path,
    keras_teacher_path: Path,
    keras_file: Path,
    tmp_path: Path,
) -> None:
    """The student is the teacher itself, whose logits the store has as float16."""
    for student in (teacher_path, keras_teacher_path, keras_file):
        found = evaluated(tmp_path, student, f"--store={published_store}", f"--data_dir={data_dir}")
        test = found["evaluation"]["test"]
        assert test["agreement"] == 1.0
        assert test["student_top1"] == test["teacher_top1"]
        assert test["distillation_loss"] == pytest.approx(0, abs=1e-5)
        assert found["image_size"] == stores.SIZE
        assert found["parameters"] == sum(weight.size for weight in stores.teacher_weights())
        alone = evaluated(tmp_path, student, f"--dataset={stores.DATASET}", f"--data_dir={data_dir}")
        figures = alone["evaluation"]["test"]
        for name in ("examples", "student_top1", "calibration_error", "confusions"):
            assert figures[name] == test[name]
        assert not {"agreement", "teacher_top1", "distillation_loss"} & figures.keys()


def test_several_stores_at_the_size_of_the_model(
    published_store: Path, data_dir: Path, teacher_path: Path, spec: Spec, models: Path, tmp_path: Path
) -> None:
    """The size that the model takes is that of no store."""
    other, module = tmp_path / "store", stores.PlainTeacher()
    module.weights[2].assign(-module.weights[2])
    teacher = stores.save_teacher(tmp_path / "teacher", module=module)
    worker = ShardWorker(stores.job_for(other, stores.make_spec(data_dir, teacher), data_dir, teacher))
    stores.write_store(worker, epochs=1)
    given = [
        f"--store={published_store}",
        f"--store={other}",
        "--store_weights=3,1",
        f"--data_dir={data_dir}",
    ]
    found = evaluated(tmp_path, models / "large.keras", *given)
    assert found["image_size"] == LARGE
    both = open_stores([published_store, other], weights=[3, 1], image_size=LARGE)
    assert (found["spec"], found["stores"]) == (both.identity()["spec"], both.identity()["stores"])
    evaluator = Evaluator(
        both,
        evaluate.open_dataset(both, "test", data_dir=str(data_dir)),
        batch_size=256,
        temperature=2.0,
        temperature_squared=False,
        cache_bytes=0,
    )
    expected = evaluator.evaluate(tf.keras.models.load_model(models / "large.keras"))
    test = found["evaluation"]["test"]
    assert [test[name] for name in ANSWERS] == [expected[name] for name in ANSWERS]
    assert [part["top1"] for part in test["teachers"]] == [part["top1"] for part in expected["teachers"]]
    assert test["distillation_loss"] == pytest.approx(expected["distillation_loss"], rel=1e-5)


def test_page_has_the_figures_of_the_result(
    run: Path, published_store: Path, data_dir: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    given = (f"--store={published_store}", f"--data_dir={data_dir}", f"--html={page}")
    found = evaluated(tmp_path, run / "student", *given)
    reader = Reader(page.read_text())
    shown = {path for path, _, _ in reader.figures}
    assert {
        f"evaluation.test.{name}" for name in (*ANSWERS, "distillation_loss", "calibration_error")
    } <= shown
    for path, value, _ in reader.figures:
        assert value == look_up(found, path), path
    assert "http" not in reader.words
    assert "script" not in reader.tags
    assert reader.tags.count("svg") == 2
    confusions = found["evaluation"]["test"]["confusions"]
    assert sum("confusions" in path for path in shown) == 4 * len(confusions)
    # Without a store, and names that are not to be trusted.
    names = ["<b>", "\u202eant", "x" * 300, "", "&amp;"]
    predictions = Predictions(
        match=evaluate.ClassMatch(names=names), labels=np.array([0, 1, 2]), class_names=names
    )
    predictions.add(np.eye(5, dtype=np.float32)[[1, 2, 3]])
    alone = evaluated(tmp_path, run / "student", f"--dataset={stores.DATASET}", f"--data_dir={data_dir}")
    alone["student"] = "<script>"
    alone["evaluation"]["test"]["confusions"] = predictions.confusions(9)
    hostile = render_evaluation(alone, {"test": predictions})
    assert "<script>" not in hostile
    assert "<b>\u202e" not in hostile
    assert "\u202e" not in hostile
    assert "agreement" not in Reader(hostile).words.lower()


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ([], ["--store", "--dataset", "neither"]),
        (["--store={store}", "--dataset=d"], ["--store", "--dataset", "both"]),
        (["--store={store}", "--student=nowhere"], ["--student=nowhere"]),
        (["--store={store}", "--student={models}/empty"], ["--student=", "empty", "SavedModel"]),
        (["--store={store}", "--student={models}/weights.h5"], ["weights.h5", "SavedModel", ".keras"]),
        (["--store={store}", "--student={run}"], ["{run}/student"]),
        (["--store={store}", "--student={models}/broken.keras"], ["--student=", "broken.keras", "zip"]),
        (["--store={store}", "--split=tset"], ["--split=tset", "test"]),
        (["--store={bare}"], ["{bare}", "--eval_splits", "--dataset=small_photos"]),
        (["--store={store}", "--store={store}"], ["{store}", "twice"]),
        (["--store={store}", "--store_weights=1"], ["--store_weights"]),
        (
            ["--store={store}", "--student={models}/classes.keras"],
            ["--student=", "7 classes", "5", "{store}"],
        ),
        (["--store={store}", "--student={models}/softmax.keras"], ["--student=", "probabilities", "logits"]),
        (["--store={store}", "--student={models}/flat"], ["--student=", "(None, 24, 24)", "[B, 24, 24, 3]"]),
        (["--store={store}", "--student={models}/large.keras", "--image_size=24"], ["32", "--image_size=32"]),
        (
            ["--store={light}", "--student={models}/large.keras"],
            ["--student=", "32", "light", "24", "--dataset"],
        ),
        (["--store={store}", "--student={models}/batches_of_4"], ["--student=", "4", "--eval_batch_size=4"]),
        (
            ["--store={store}", "--student_signature=predict"],
            ["--student_signature=predict", "serving_default"],
        ),
        (["--store={store}", "--student_output=probabilities"], ["--student_output=probabilities", "logits"]),
        (["--store={store}", "--label_feature=label"], ["--label_feature", "--dataset"]),
        (["--store={store}", "--recipe=bit"], ["--recipe=bit", "--dataset"]),
        (["--dataset=small_photos", "--recipe=soup"], ["--recipe=soup", "bit"]),
        (["--dataset=small_photos", "--temperature=3"], ["--temperature=3", "--store"]),
        (["--dataset=small_photos", "--split=tset"], ["--split=tset", "test, train"]),
        (["--dataset=small_photo"], ["--dataset=small_photo"]),
        (["--dataset=small_photos", "--student={models}/classes.keras"], ["--student=", "7 classes", "5"]),
        (["--dataset=small_photos", "--student={models}/any_size.keras"], ["--student=", "--image_size"]),
        (["--dataset=small_photos", "--label_feature=none"], ["--label_feature=none"]),
    ],
    ids=lambda value: " ".join(value)[:70] if value and str(value[0]).startswith("--") else "",
)
def test_mistakes_exit_2_with_one_line(
    flags: list[str],
    parts: list[str],
    run: Path,
    published_store: Path,
    three_epochs: Path,
    light_store: Path,
    models: Path,
    data_dir: Path,
    teacher_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {
        "store": published_store,
        "bare": three_epochs,
        "light": light_store,
        "models": models,
        "run": run,
    }
    given = [
        f"--student={teacher_path}",
        f"--data_dir={data_dir}",
        *(flag.format(**places) for flag in flags),
    ]
    code, line = runs.fail(given, capsys, main=evaluate.main)
    assert code == 2, line
    for part in parts:
        assert part.format(**places) in line


@pytest.fixture(scope="module")
def light_store(data_dir: Path, teacher_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose views have one size; read-only."""
    store = tmp_path_factory.mktemp("light") / "store"
    spec = stores.make_spec(data_dir, teacher_path, policy=Light(image_size=stores.SIZE))
    stores.write_store(ShardWorker(stores.job_for(store, spec, data_dir, teacher_path)), epochs=1)
    return store


def test_numbers_that_are_not_finite_and_other_pixels_exit_3(
    published_store: Path,
    models: Path,
    data_dir: Path,
    other_data_dir: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for student, data, parts in (
        ("nan", data_dir, ["--student=", "nan"]),
        ("any_size", other_data_dir, ["fingerprint", str(published_store)]),
    ):
        argv = [f"--store={published_store}", f"--student={models / student}.keras", f"--data_dir={data}"]
        code, line = runs.fail(argv, capsys, main=evaluate.main)
        assert code == 3, line
        for part in parts:
            assert part in line


def test_images_without_a_label_are_left_out_and_counted(
    teacher_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = encoded_images(TEST_IMAGES, seed=50)
    stores.prepare_dataset(tmp_path, {"test": images, "hidden": images[:2]}, unlabeled=(0, 1))
    given = (f"--dataset={stores.DATASET}", f"--data_dir={tmp_path}")
    figures = evaluated(tmp_path, teacher_path, *given)["evaluation"]["test"]
    assert (figures["examples"], figures["unlabeled"]) == (7, 2)
    assert figures["student_top1"] in [right / 5 for right in range(6)]
    assert "2 of 7" in capsys.readouterr().out
    code, line = runs.fail(
        [f"--student={teacher_path}", *given, "--split=hidden"], capsys, main=evaluate.main
    )
    assert code == 2
    assert "--split=hidden" in line


def test_a_fixed_batch_and_a_size_that_is_free(
    published_store: Path, models: Path, data_dir: Path, tmp_path: Path
) -> None:
    given = (f"--store={published_store}", f"--data_dir={data_dir}")
    fixed = evaluated(tmp_path, models / "batches_of_4", *given, "--eval_batch_size=4")
    assert fixed["evaluation"]["test"]["agreement"] == 1.0
    for flags, size in (((), stores.SIZE), (("--image_size=40",), 40)):
        assert evaluated(tmp_path, models / "any_size.keras", *given, *flags)["image_size"] == size
