"""trainer.train with students of the user and of Keras: trained, exported, resumed, compared, and not confused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from pipeline.errors import EXIT_USER_ERROR
from pipeline.store.reader import StoreReader
from tests import own_students, stores
from tests.images import pictures
from tests.runs import arguments, fail, options, start_run
from tests.trainer.models.test_tflite import converted_logits
from tests.trainer.test_resume import check_resume_at_every_step, without_workdir
from trainer.compare import main as compare
from trainer.models import build_student
from trainer.train import main

NESTED = "--student=tests.own_students:nested"


def result_of(workdir: Path) -> dict:
    return json.loads((workdir / "result.json").read_text())


def exported_logits(workdir: Path, image: np.ndarray) -> np.ndarray:
    """Logits of the exported student for one image; those of its conversion by TFLite have to agree."""
    student = tf.saved_model.load(str(workdir / "student"))
    (logits,) = student.signatures["serving_default"](tf.constant(image)).values()
    np.testing.assert_allclose(converted_logits(workdir / "student", image), logits, rtol=1e-3, atol=1e-3)
    return logits.numpy()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["MobileNetV3Small", "EfficientNetV2B0", "ConvNeXtTiny", "ResNet50", "VGG16", "DenseNet121"],
)
def test_keras_model_is_trained_and_exported(
    name: str, published_store: Path, data_dir: Path, tmp_path: Path
) -> None:
    extra = (f"--student=keras:{name}", "--image_size=32", "--steps=2", "--log_every=1", "--warmup_steps=1")
    assert main(arguments(published_store, tmp_path, data_dir, *extra)) == 0
    assert result_of(tmp_path)["student"] == f"keras:{name}"
    assert exported_logits(tmp_path, np.asarray(pictures(1, 32))).shape == (1, stores.CLASSES)


@pytest.mark.usefixtures("deterministic")
def test_run_with_dropout_resumed_at_every_step_ends_bit_equal(
    three_epochs: Path, data_dir: Path, tmp_path: Path
) -> None:
    argv = arguments(
        three_epochs, tmp_path, data_dir, NESTED, "--batch_size=12", "--steps=2", "--eval_every=2"
    )
    check_resume_at_every_step(without_workdir(argv), tmp_path)


@pytest.mark.parametrize("name", ["wide", "softmax", "untracked"])
def test_wrong_student_is_refused_before_a_shard_is_read(
    name: str, store: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for shard in store.glob("views.array_record-*"):
        shard.write_bytes(b"\0" * shard.stat().st_size)
    argv = arguments(store, tmp_path / "run", data_dir, f"--student=tests.own_students:{name}")
    code, message = fail(argv, capsys)
    assert code == EXIT_USER_ERROR
    assert f"--student=tests.own_students:{name}: " in message
    assert [path.name for path in (tmp_path / "run").iterdir()] in ([], [".lock"], ["writer.lock"])


def test_mistakes_in_the_name_are_refused(
    published_store: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flag, word in (
        ("--student=keras:VGG17", "keras:VGG1"),
        ("--student=nowhere.models:build", "nowhere"),
        ("--student=nowhere/model.keras", "nowhere/model.keras"),
        ("--student=keras:VGG16", "32"),  # for a store of 24 pixels
        ("--init=nowhere.h5", "--init=nowhere.h5"),
    ):
        code, message = fail(arguments(published_store, tmp_path / "run", data_dir, flag), capsys)
        assert code == EXIT_USER_ERROR
        assert word in message
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A student as a `.keras` file, and the same with other weights."""
    root = tmp_path_factory.mktemp("saved")
    out = {}
    for seed, name in enumerate(("one", "two")):
        tf.keras.utils.set_random_seed(seed)
        out[name] = root / f"{name}.keras"
        own_students.batch_norm(stores.CLASSES, stores.SIZE).save(out[name])
    return out


def test_saved_student_starts_from_its_weights_and_is_part_of_the_run(
    saved: dict[str, Path],
    published_store: Path,
    data_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def argv(student: Path, *extra: str) -> list[str]:
        return arguments(published_store, tmp_path / "run", data_dir, f"--student={student}", *extra)

    run = start_run(argv(saved["one"], "--steps=1", "--learning_rate=0", "--weight_decay=0"))
    before = build_student(str(saved["one"]), num_classes=stores.CLASSES, image_size=stores.SIZE)
    for ours, theirs in zip(run.student.weights, before.weights, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    run.finish(run.train())
    image = np.asarray(pictures(1, stores.SIZE))
    np.testing.assert_allclose(exported_logits(run.workdir, image), run.student(image), atol=1e-4)
    fingerprint = result_of(run.workdir)["fingerprints"]["student"]
    code, message = fail(argv(saved["two"], "--steps=2", "--learning_rate=0", "--weight_decay=0"), capsys)
    assert code == EXIT_USER_ERROR
    assert f"sha256 {fingerprint} in the checkpoint" in message
    moved = Path(shutil.copy(saved["one"], tmp_path / "moved.keras"))  # the same student
    assert (
        start_run(argv(moved, "--steps=2", "--learning_rate=0", "--weight_decay=0")).train()["first_step"]
        == 1
    )


def test_workers_compare_files_not_paths(
    saved: dict[str, Path], published_store: Path, tmp_path: Path
) -> None:
    def shared(*flags: str) -> dict[str, object]:
        store = StoreReader(published_store)
        return options(arguments(published_store, tmp_path, None, *flags), store).shared(store.identity())

    one, two = (shared(f"--student={path}", f"--init={path}") for path in saved.values())
    assert {name for name in one if one[name] != two[name]} == {"student", "init"}
    copy = tmp_path / "one.keras"
    copy.write_bytes(saved["one"].read_bytes())
    assert shared(f"--student={copy}", f"--init={copy}") == one
    assert shared(NESTED)["student"] == NESTED.removeprefix("--student=")
    assert "init" not in shared(NESTED)


def test_initial_weights_are_loaded_reported_and_part_of_the_run(
    saved: dict[str, Path],
    published_store: Path,
    data_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = arguments(
        published_store, tmp_path, data_dir, "--student=tests.own_students:batch_norm", "--steps=1"
    )
    run = start_run([*argv, f"--init={saved['one']}"])
    assert "loaded 12 of 12 weights" in capsys.readouterr().out
    before = tf.keras.models.load_model(saved["one"])
    for ours, theirs in zip(run.student.weights, before.weights, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    run.train()
    assert set(run.options.fingerprints) == {"init"}
    for flags in ([], [f"--init={saved['two']}"]):
        code, message = fail([*argv, "--steps=2", *flags], capsys)
        assert code == EXIT_USER_ERROR
        assert "init: " in message
        assert "in the checkpoint" in message


@pytest.mark.slow
def test_arms_are_compared_with_a_student_of_the_user(
    published_store: Path, data_dir: Path, teacher_path: Path, tmp_path: Path
) -> None:
    flags = [f"--teacher={teacher_path}", NESTED, "--batch_size=5", "--epochs=1", "--arms=offline,online"]
    places = [f"--store={published_store}", f"--workdir={tmp_path}", f"--data_dir={data_dir}"]
    assert compare([*places, *flags, "--no-measure"]) == 0
    result = result_of(tmp_path)
    assert result["student"]["name"] == NESTED.removeprefix("--student=")
    assert len(result["runs"]) == 2
