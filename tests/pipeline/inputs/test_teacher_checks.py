"""pipeline.inputs.teacher_checks: a teacher whose outputs depend on more than a row, or are no logits, never gets as far as a shard."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from pipeline import plan, verify
from pipeline.errors import EXIT_USER_ERROR, DataError, UserError
from pipeline.flags.precompute import announce_demo, make_parser
from pipeline.inputs.locate import load_teacher
from pipeline.inputs.teacher import Teacher
from pipeline.inputs.teacher_checks import TOLERANCE, TOLERANCES, check_logits, trial_crops
from pipeline.precompute import main
from pipeline.precomputing.options import resolve
from pipeline.precomputing.worker import ShardWorker, row_name
from pipeline.store.reader import StoreReader
from pipeline.store.spec import SPEC_FILE, Spec
from tests.runs import fail
from tests.stores import (
    BATCH,
    CLASSES,
    SIZE,
    Asked,
    PlainTeacher,
    job_for,
    make_spec,
    save_teacher,
    write_store,
)
from trainer.flags.train import make_parser as train_parser
from trainer.run.options import resolve as resolve_training
from trainer.targets.online_teacher import BatchedTeacher, try_teacher
from trainer.train import main as train

CROPS = trial_crops(BATCH + 2, SIZE)


def standardized(image: tf.Tensor, module: PlainTeacher) -> tf.Tensor:
    mean, variance = tf.nn.moments(module(image), [0], keepdims=True)
    return (module(image) - mean) / tf.sqrt(variance + 1e-6)


def dropped(image: tf.Tensor, module: PlainTeacher) -> tf.Tensor:
    return tf.nn.dropout(module(image), 0.1)


def dropped_by_place(image: tf.Tensor, module: PlainTeacher) -> tf.Tensor:
    """The same mask for each call: rows run twice agree, rows at another place do not."""
    return tf.nn.experimental.stateless_dropout(module(image), 0.3, seed=[1, 2])


MISTAKES = {"standardized": standardized, "dropout": dropped, "fixed_dropout": dropped_by_place}


def save_mistake(path: Path, kind: str) -> Path:
    module = PlainTeacher()
    return save_teacher(path, lambda image: {"logits": MISTAKES[kind](image, module)}, module=module)


def network(*, training: bool, dtype: str) -> tf.keras.Model:
    """Convolution, batch norm and a head; `training` is how its batch norm is exported."""
    tf.keras.utils.set_random_seed(0)
    layers = tf.keras.layers
    image = tf.keras.Input([SIZE, SIZE, 3])
    x = layers.Rescaling(1 / 255.0, dtype=dtype)(image)
    x = layers.Conv2D(8, 5, strides=2, dtype=dtype)(x)
    x = layers.BatchNormalization(dtype=dtype)(x, training=training)
    x = layers.Conv2D(8, 3, activation="relu", dtype=dtype)(x)
    x = layers.GlobalAveragePooling2D(dtype=dtype)(x)
    return tf.keras.Model(image, layers.Dense(CLASSES, kernel_initializer="orthogonal", dtype=dtype)(x))


def save_network(path: Path, *, training: bool = False, dtype: str = "float32") -> Path:
    model = network(training=training, dtype=dtype)
    return save_teacher(path, lambda image: {"logits": tf.cast(model(image), tf.float32)}, module=model)


def check(path: Path, batch_size: int = BATCH) -> None:
    Teacher(path, image_size=SIZE, num_classes=CLASSES, batch_size=batch_size).check_rows(CROPS)


@pytest.mark.parametrize("kind", MISTAKES)
def test_outputs_that_depend_on_the_batch_or_on_chance_are_refused(tmp_path: Path, kind: str) -> None:
    reason = "chance" if kind == "dropout" else "rest of the batch"
    with pytest.raises(UserError, match=reason):
        check(save_mistake(tmp_path / "t", kind))


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16", "mixed_float16"])
def test_batch_norm_passes_in_inference_mode_and_not_in_training_mode(tmp_path: Path, dtype: str) -> None:
    check(save_network(tmp_path / "good", dtype=dtype))
    with pytest.raises(UserError, match="rest of the batch") as caught:
        check(save_network(tmp_path / "bad", training=True, dtype=dtype))
    tolerance = TOLERANCES.get(dtype.removeprefix("mixed_"), TOLERANCE)
    assert f"{tolerance:.2g}" in str(caught.value)


def test_a_batch_of_one_has_no_neighbors(tmp_path: Path, teacher_path: Path) -> None:
    check(teacher_path, batch_size=1)
    with pytest.raises(UserError, match="chance"):
        check(save_mistake(tmp_path / "t", "dropout"), batch_size=1)


def test_a_teacher_in_training_mode_gets_no_store(
    asked: Asked, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = dataclasses.replace(asked, teacher=save_mistake(tmp_path / "t", "standardized"))
    code, line = fail(asked.flags(), capsys, main=main)
    assert code == EXIT_USER_ERROR
    assert str(asked.teacher) in line
    assert "inference mode" in line
    assert not (asked.store / SPEC_FILE).exists()


@pytest.fixture(scope="module")
def bad_store(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> tuple[Path, Path]:
    """A store that an earlier version let such a teacher write, and the teacher."""
    directory = tmp_path_factory.mktemp("bad")
    teacher = save_mistake(directory / "t", "standardized")
    spec = make_spec(data_dir, teacher)
    write_store(ShardWorker(job_for(directory / "store", spec, data_dir, teacher)), epochs=1, eval_splits=())
    return directory / "store", teacher


def test_verify_runs_the_teacher_among_other_views(
    bad_store: tuple[Path, Path], data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, teacher = bad_store
    argv = [f"--store={store}", f"--teacher={teacher}", f"--data_dir={data_dir}"]
    code, line = fail(argv, capsys, main=verify.main)
    assert code == EXIT_USER_ERROR
    assert "rest of the batch" in line


@pytest.mark.parametrize("arguments", [["--epochs=2"], ["--arm=online"]], ids=["past_the_store", "live_arm"])
def test_no_online_step_is_taken_with_it(
    bad_store: tuple[Path, Path],
    data_dir: Path,
    tmp_path: Path,
    arguments: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    store, teacher = bad_store
    argv = [
        f"--store={store}",
        f"--teacher={teacher}",
        f"--data_dir={data_dir}",
        f"--workdir={tmp_path}/run",
        "--student=tiny",
        "--batch_size=4",
        "--allow_short_run",
        *arguments,
    ]
    code, line = fail(argv, capsys, main=train)
    assert code == EXIT_USER_ERROR
    assert "rest of the batch" in line
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# --- probabilities

GENERATOR = np.random.default_rng(3)


def logits(count: int = 16, classes: int = CLASSES, scale: float = 3.0) -> tf.Tensor:
    return tf.constant(scale * GENERATOR.normal(size=(count, classes)), tf.float32)


def softmax_in(dtype: tf.DType, *, classes: int) -> np.ndarray:
    return tf.cast(tf.nn.softmax(tf.cast(logits(64, classes), dtype)), tf.float32).numpy()


@pytest.mark.parametrize("classes", [2, 5, 1000])
@pytest.mark.parametrize("dtype", [tf.float32, tf.bfloat16, tf.float16])
def test_a_softmax_is_refused_in_any_type_whatever_is_assumed(dtype: tf.DType, classes: int) -> None:
    for assume in (False, True):
        with pytest.raises(UserError, match="probabilities"):
            check_logits(softmax_in(dtype, classes=classes), what="`teacher`=t", assume_logits=assume)


@pytest.mark.parametrize(
    "outputs",
    [
        lambda: tf.sigmoid(logits()).numpy(),
        lambda: 100 * tf.nn.softmax(logits()).numpy(),
        lambda: 100 * softmax_in(tf.bfloat16, classes=102),
        lambda: 5 * tf.nn.softmax(logits(scale=0.1)).numpy(),
    ],
    ids=["sigmoid", "percent", "percent_bfloat16", "high_temperature"],
)
def test_what_looks_like_probabilities_needs_a_flag(outputs: Callable[[], np.ndarray]) -> None:
    found = outputs()
    with pytest.raises(UserError, match="`assume_logits`"):
        check_logits(found, what="`teacher`=t", assume_logits=False)
    check_logits(found, what="`teacher`=t", assume_logits=True)


@pytest.mark.parametrize(
    "outputs",
    [
        lambda: logits().numpy(),
        lambda: logits().numpy() + 100,
        lambda: tf.nn.relu(logits(classes=1000)).numpy(),
        lambda: tf.nn.log_softmax(logits()).numpy(),
        lambda: logits(classes=1000, scale=0.01).numpy() + 5,
        lambda: 0.3 * logits().numpy(),
    ],
    ids=["plain", "offset", "relu", "log_softmax", "nearly_constant", "small"],
)
def test_logits_pass(outputs: Callable[[], np.ndarray]) -> None:
    check_logits(outputs(), what="`teacher`=t", assume_logits=False)


def save_sigmoid(path: Path) -> Path:
    module = PlainTeacher()
    return save_teacher(path, lambda image: {"logits": tf.sigmoid(module(image))}, module=module)


def test_the_flag_goes_with_the_store(
    asked: Asked, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = dataclasses.replace(asked, teacher=save_sigmoid(tmp_path / "t"))
    code, line = fail(asked.flags(), capsys, main=main)
    assert code == EXIT_USER_ERROR
    assert "--assume_logits" in line
    assert not (asked.store / SPEC_FILE).exists()
    assert main(asked.flags("--assume_logits", "--epochs=1")) == 0
    assert StoreReader(asked.store).spec.provenance["assume_logits"] is True
    arguments = [f"--store={asked.store}", f"--data_dir={asked.data_dir}"]
    assert verify.main(arguments) == 0


def test_an_online_step_takes_no_probabilities(spec: Spec) -> None:
    module = PlainTeacher()
    teacher = BatchedTeacher(lambda views: tf.nn.softmax(module(views)), BATCH)
    with pytest.raises(UserError, match="probabilities"):
        try_teacher(teacher, spec, path="t", jit_compile=False)
    try_teacher(BatchedTeacher(module, BATCH), spec, path="t", jit_compile=False)


# --- what a command loads


def test_a_command_loads_and_hashes_its_teacher_once(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, hashed = [], []
    load, fingerprint = tf.saved_model.load, Teacher.fingerprint.func
    monkeypatch.setattr(tf.saved_model, "load", lambda path: loaded.append(path) or load(path))
    monkeypatch.setattr(Teacher.fingerprint, "func", lambda self: hashed.append(self) or fingerprint(self))
    assert main(asked.flags("--epochs=1", "--eval_splits=none")) == 0
    assert len(loaded) == len(hashed) == 1


def test_one_class_is_refused_wherever_it_is_seen(
    teacher_path: Path, published_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="one class"):
        Teacher(teacher_path, image_size=SIZE, num_classes=1)
    store = StoreReader(published_store)
    store.spec = dataclasses.replace(store.spec, num_classes=1)
    flags = train_parser().parse_strictly([f"--store={published_store}", f"--workdir={tmp_path}"])
    with pytest.raises(UserError, match="one class"):
        resolve_training(flags, store)
    argv = ["--num_examples=10", "--num_classes=1", "--teacher_rate=5"]
    code, line = fail(argv, capsys, main=plan.main)
    assert code == EXIT_USER_ERROR
    assert "one class" in line


def test_another_teacher_is_never_loaded(spec: Spec, tmp_path: Path) -> None:
    """Its code does not run: the fingerprint comes first."""
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "saved_model.pb").write_bytes(b"what no loader takes")
    with pytest.raises(DataError, match="fingerprint"):
        load_teacher(spec, str(tmp_path / "t"))


def test_a_row_has_a_name_that_leads_to_its_image() -> None:
    batch = {
        "views": tf.constant([40, 41, 42]),
        "example": tf.constant([7, 3, 9]),
        "partner": tf.constant([1, 2]),
    }
    assert row_name(batch, 1) == "view 41 (example 3, mixed with example 9)"
    assert row_name(batch, 0, split="test") == "example 7 of test"


def test_options_hold_the_loaded_teacher(asked: Asked) -> None:
    flags, _ = make_parser().parse_known_args(asked.flags())
    options = resolve(flags, is_demo=announce_demo(flags))
    assert options.loaded.identity(batch_size=BATCH) == options.spec.teacher
