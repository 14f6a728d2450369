"""pipeline.inputs.teacher: the same logits however a teacher was saved, and every misfit in one line."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from pipeline.cli.choices import VALUE_RANGES
from pipeline.errors import DataError, UserError
from pipeline.inputs.teacher import Teacher, fingerprint
from pipeline.views.mix import mix
from tests.stores import BATCH, CLASSES, SIZE, PlainTeacher, keras_teacher, save_teacher, teacher_weights

GENERATOR = np.random.default_rng(0)
CROPS = tf.constant(GENERATOR.integers(0, 256, (BATCH + 2, SIZE, SIZE, 3), np.uint8))
PARTNER = tf.constant([1, 2, 3, 4])
RATIO = tf.constant([0.3, 1.0, 0.9, 0.0])
VIEWS = mix(CROPS, PARTNER, RATIO)


def load(path: Path, **arguments: Any) -> Teacher:
    return Teacher(path, **({"image_size": SIZE, "num_classes": CLASSES} | arguments))


def run(path: Path, **arguments: Any) -> np.ndarray:
    return load(path, **arguments).logits(CROPS, PARTNER, RATIO)


def test_logits_of_the_mixed_views(teacher_path: Path) -> None:
    np.testing.assert_allclose(run(teacher_path), PlainTeacher()(VIEWS).numpy(), rtol=1e-5, atol=1e-5)


def test_plain_keras_and_dot_keras_agree(
    teacher_path: Path, keras_teacher_path: Path, tmp_path: Path
) -> None:
    keras_teacher().save(tmp_path / "teacher.keras")
    plain = run(teacher_path)
    np.testing.assert_allclose(run(keras_teacher_path), plain, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(run(tmp_path / "teacher.keras"), plain, rtol=1e-4, atol=1e-4)
    assert load(tmp_path / "teacher.keras").signature == "keras"
    assert plain.std() > 0.1


def test_logits_are_repeatable_and_rows_do_not_depend_on_their_neighbours(teacher_path: Path) -> None:
    teacher = load(teacher_path)
    first = teacher.logits(CROPS, PARTNER, RATIO)
    np.testing.assert_array_equal(first, load(teacher_path).logits(CROPS, PARTNER, RATIO))
    other = tf.concat([CROPS[:3], 255 - CROPS[3:]], 0)
    np.testing.assert_array_equal(teacher.logits(other, PARTNER, RATIO)[:2], first[:2])


def test_teacher_that_does_not_fit_into_memory_names_its_batch_size(tmp_path: Path) -> None:
    module = PlainTeacher()

    def call(image: tf.Tensor) -> dict[str, tf.Tensor]:
        # 35 TB per row: for 4 rows more than the addresses that a process has.
        huge = tf.broadcast_to(image[:, :1, :1, :1], [tf.shape(image)[0], 2**21, 2**22, 1])
        return {"logits": module(image) + tf.reduce_max(huge, axis=[1, 2])}

    path = save_teacher(tmp_path / "greedy", call, module=module)
    with pytest.raises(UserError, match=r"CPU:0.*\b4 views.*`teacher_batch_size`"):
        run(path)


def stem(image: tf.Tensor) -> dict[str, tf.Tensor]:
    """ "Logits" that show what the model was fed: lowest, mean and highest value, and two zeros."""
    flat = tf.reshape(image, [tf.shape(image)[0], SIZE * SIZE * 3])
    parts = [tf.reduce_min(flat, 1), tf.reduce_mean(flat, 1), tf.reduce_max(flat, 1)]
    return {"logits": tf.stack([*parts, 0 * parts[0], 0 * parts[0]], 1)}


@pytest.mark.parametrize(
    ("value_range", "low", "high"), [("0..255", 0, 255), ("0..1", 0, 1), ("-1..1", -1, 1)]
)
def test_value_range(tmp_path: Path, value_range: str, low: float, high: float) -> None:
    path = save_teacher(tmp_path / "stem", stem)
    crops = tf.stack(
        [tf.zeros([SIZE, SIZE, 3], tf.uint8), tf.fill([SIZE, SIZE, 3], tf.constant(255, tf.uint8))]
    )
    crops = tf.concat([crops, crops, crops], 0)
    black_and_white = load(path, value_range=value_range).logits(crops, tf.range(4), tf.ones([4]))
    np.testing.assert_allclose(black_and_white[:2, 1], [low, high], atol=1e-6)
    found = run(path, value_range=value_range)
    assert low <= found[:, 0].min() < found[:, 2].max() <= high + 1e-6
    assert set(VALUE_RANGES) == {"0..255", "0..1", "-1..1"}


def test_an_unknown_value_range_is_refused(teacher_path: Path) -> None:
    with pytest.raises(UserError, match=r"`teacher_value_range`=0\.\.2: .*0\.\.255, 0\.\.1, -1\.\.1"):
        load(teacher_path, value_range="0..2")


def test_another_signature_by_name(tmp_path: Path) -> None:
    path = save_teacher(tmp_path / "t", signature="predict")
    assert run(path, signature="predict").shape == (BATCH, CLASSES)
    with pytest.raises(UserError, match=r"`teacher_signature`=serving_default: .*predict"):
        load(path)


def test_a_missing_signature_is_refused(tmp_path: Path) -> None:
    tf.saved_model.save(PlainTeacher(), str(tmp_path / "t"))
    with pytest.raises(UserError, match=r"`teacher_signature`=serving_default: .*none"):
        load(tmp_path / "t")


def test_a_half_precision_teacher_gets_its_own_type(tmp_path: Path) -> None:
    def half(image: tf.Tensor) -> dict[str, tf.Tensor]:
        assert image.dtype == tf.float16
        return {"logits": tf.cast(stem(tf.cast(image, tf.float32))["logits"], tf.float16)}

    inputs = {"image": tf.TensorSpec([None, SIZE, SIZE, 3], tf.float16)}
    found = run(save_teacher(tmp_path / "t", half, inputs=inputs))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[:, 1], tf.reduce_mean(VIEWS, [1, 2, 3]), rtol=2e-3)


def test_one_output_of_any_name_or_one_named_logits(tmp_path: Path) -> None:
    module = PlainTeacher()
    path = save_teacher(tmp_path / "a", lambda image: {"scores": module(image)}, module=module)
    np.testing.assert_allclose(run(path), module(VIEWS).numpy(), rtol=1e-5, atol=1e-5)
    path = save_teacher(
        tmp_path / "b",
        lambda image: {"features": tf.reduce_mean(image, [1, 2]), "logits": module(image)},
        module=module,
    )
    np.testing.assert_allclose(run(path), module(VIEWS).numpy(), rtol=1e-5, atol=1e-5)
    path = save_teacher(
        tmp_path / "c", lambda image: {"features": module(image), "scores": module(image)}, module=module
    )
    with pytest.raises(UserError, match=r"features.*scores.*`teacher_output`=features"):
        load(path)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            {"image": tf.TensorSpec([None, 32, 32, 3])},
            r"takes .*\(None, 32, 32, 3\).*\[B, 24, 24, 3\].*`image_size`=32",
        ),
        (
            {"image": tf.TensorSpec([None, SIZE, SIZE, 1])},
            r"takes float32 \(None, 24, 24, 1\).*rgb_to_grayscale",
        ),
        ({"image": tf.TensorSpec([None, 3, SIZE, SIZE])}, r"takes float32 \(None, 3, 24, 24\).*tf.transpose"),
        (
            {"image": tf.TensorSpec([None, SIZE, SIZE, 3], tf.uint8)},
            r"takes uint8 .* but views are float32 .* float32 input",
        ),
        ({"image": tf.TensorSpec([None, SIZE, SIZE, 3], tf.int32)}, r"takes int32 .* but views are float32"),
        ({"image": tf.TensorSpec([None], tf.string)}, r"takes string .* but views are float32"),
        (
            {"image": tf.TensorSpec([None, SIZE, SIZE, 3]), "training": tf.TensorSpec([], tf.bool)},
            "image, training",
        ),
    ],
    ids=["size", "channels", "channels_first", "uint8", "int32", "string", "two_inputs"],
)
def test_an_input_that_is_not_a_view_is_refused(
    tmp_path: Path, inputs: dict[str, tf.TensorSpec], message: str
) -> None:
    def call(**given: tf.Tensor) -> dict[str, tf.Tensor]:
        used = [
            tf.zeros([]) if t.dtype == tf.string else tf.reduce_sum(tf.cast(t, tf.float32))
            for t in given.values()
        ]
        return {"logits": tf.zeros([4, CLASSES]) + tf.add_n(used)}

    with pytest.raises(UserError, match=message):
        load(save_teacher(tmp_path / "t", call, inputs=inputs))


def constant(rows: Callable[[tf.Tensor], tf.Tensor]) -> Callable[[tf.Tensor], dict[str, tf.Tensor]]:
    return lambda image: {"logits": rows(tf.reduce_mean(image, [1, 2, 3]))}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (lambda m: tf.tile(m[:, None], [1, CLASSES + 1]), r"\(4, 6\), expected \(4, 5\)"),
        (lambda m: m, r"\(4,\), expected \(4, 5\)"),
        (lambda m: tf.tile(m[:, None, None, None], [1, 1, 1, CLASSES]), r"\(4, 1, 1, 5\), expected"),
        (lambda m: tf.fill([1, CLASSES], m[0]), r"\(1, 5\), expected \(4, 5\)"),
    ],
    ids=["class_count", "vector", "map", "batch"],
)
def test_an_output_of_another_shape_is_refused(
    tmp_path: Path, rows: Callable[[tf.Tensor], tf.Tensor], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run(save_teacher(tmp_path / "t", constant(rows)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_logit_that_is_no_number_is_refused_with_its_place(tmp_path: Path, value: float) -> None:
    def rows(mean: tf.Tensor) -> tf.Tensor:
        logits = tf.tile(mean[:, None], [1, CLASSES])
        return tf.where(tf.reshape(tf.range(20), [4, 5]) == 13, value, logits)

    with pytest.raises(DataError, match=f"logit 3 of row 2 .*{value}"):
        run(save_teacher(tmp_path / "t", constant(rows)))


def test_a_fixed_batch_of_another_size_is_refused(tmp_path: Path) -> None:
    module = PlainTeacher()
    inputs = {"image": tf.TensorSpec([8, SIZE, SIZE, 3])}
    path = save_teacher(tmp_path / "t", lambda image: {"logits": module(image)}, module=module, inputs=inputs)
    with pytest.raises(UserError, match=r"`teacher`=.*\b4\b"):
        run(path)

    with pytest.raises(UserError, match=r"`teacher_batch_size`=8"):
        load(path, batch_size=4)


def test_one_logit_of_two_classes_gets_advice(tmp_path: Path) -> None:
    path = save_teacher(tmp_path / "t", lambda image: {"logits": tf.reduce_mean(image, [1, 2, 3])[:, None]})
    with pytest.raises(UserError, match=r"\(4, 1\), expected \(4, 2\).*tf.concat\(\[tf.zeros_like\(z\), z\]"):
        run(path, num_classes=2)


@pytest.mark.parametrize("width", [0, 1], ids=["no_axis", "one_logit"])
def test_one_logit_gets_advice_where_classes_are_counted(tmp_path: Path, width: int) -> None:
    def call(image: tf.Tensor) -> dict[str, tf.Tensor]:
        logit = tf.reduce_mean(image, [1, 2, 3])
        return {"logits": logit[:, None] if width else logit}

    with pytest.raises(UserError, match=r"tf.concat\(\[tf.zeros_like\(z\), z\]"):
        load(save_teacher(tmp_path / "t", call), num_classes=None)


def test_the_number_of_classes_is_that_of_the_output(tmp_path: Path, teacher_path: Path) -> None:
    assert load(teacher_path, num_classes=None).num_classes == CLASSES
    module = PlainTeacher(7)
    unknown = tf.Variable(7)

    def call(image: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"logits": tf.reshape(module(image), [-1, unknown])}  # a width that only a trial shows

    module.unknown = unknown
    path = save_teacher(tmp_path / "t", call, module=module)
    assert load(path, num_classes=None).num_classes == 7
    assert load(path, num_classes=None, batch_size=3).num_classes == 7


def test_an_output_that_is_no_vector_per_view_is_refused(tmp_path: Path) -> None:
    path = save_teacher(tmp_path / "t", lambda image: {"map": image[:, :3, :3]})
    with pytest.raises(UserError, match=r"\(None, 3, 3, 3\), expected \[B, C\]"):
        load(path, num_classes=None)


def two_outputs(image: tf.Tensor) -> dict[str, tf.Tensor]:
    return {"first": tf.reduce_mean(image, [1, 2]), "second": tf.reduce_max(image, [1])[:, :4, 0]}


@pytest.mark.parametrize("kind", ["saved_model", "keras_list", "keras_dict"])
def test_one_of_several_outputs_by_name(tmp_path: Path, kind: str) -> None:
    if kind == "saved_model":
        path = save_teacher(tmp_path / "t", two_outputs)
    else:
        path, image = tmp_path / "t.keras", tf.keras.Input([SIZE, SIZE, 3])
        first = tf.keras.layers.GlobalAveragePooling2D(name="first")(image)
        outputs = {"first": first, "second": tf.keras.layers.Dense(4, name="second")(first)}
        tf.keras.Model(image, outputs if kind == "keras_dict" else [*outputs.values()]).save(path)
    teacher = load(path, num_classes=None, output="first")
    assert (teacher.num_classes, load(path, num_classes=None, output="second").num_classes) == (3, 4)
    assert teacher.identity(batch_size=BATCH).to_json()["output"] == "first"
    mean = tf.reduce_mean(VIEWS, [1, 2]).numpy()
    np.testing.assert_allclose(teacher.logits(CROPS, PARTNER, RATIO), mean, rtol=1e-5)
    for output, parameter in ((None, "`teacher_output`=first"), ("third", "`teacher_output`=third")):
        with pytest.raises(UserError, match=r"first.*second") as caught:
            load(path, num_classes=None, output=output)
        assert parameter in str(caught.value)


def test_the_default_output_has_no_place_in_the_identity(teacher_path: Path) -> None:
    named = load(teacher_path, output="logits").identity(batch_size=BATCH)
    assert named == load(teacher_path).identity(batch_size=BATCH)


def make_garbage(path: Path) -> Path:
    path.mkdir()
    (path / "saved_model.pb").write_bytes(b"not a protocol buffer")
    return path


@pytest.mark.parametrize("kind", ["missing", "empty_directory", "garbage", "other_file", "garbage_keras"])
def test_what_is_no_model_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("t.keras" if kind == "garbage_keras" else "t.h5" if kind == "other_file" else "t")
    if kind == "empty_directory":
        path.mkdir()
    elif kind == "garbage":
        make_garbage(path)
    elif kind != "missing":
        path.write_bytes(b"not a model")
    with pytest.raises(UserError) as caught:
        load(path)
    assert str(caught.value).startswith(f"`teacher`={path}: ")
    assert "\n" not in str(caught.value)


def test_a_truncated_saved_model_is_refused(tmp_path: Path, teacher_path: Path) -> None:
    path = Path(shutil.copytree(teacher_path, tmp_path / "t"))
    for file in (path / "variables").glob("*.data*"):
        file.unlink()
    with pytest.raises(UserError, match=f"`teacher`={path}: "):
        load(path)


@pytest.mark.parametrize("kind", ["two_inputs", "wrong_size"])
def test_a_keras_file_that_takes_no_view_is_refused(tmp_path: Path, kind: str) -> None:
    size = 32 if kind == "wrong_size" else SIZE
    image = tf.keras.Input([size, size, 3])
    inputs = [image, tf.keras.Input([2])] if kind == "two_inputs" else [image]
    pooled = tf.keras.layers.GlobalAveragePooling2D()(image)
    hidden = tf.keras.layers.Concatenate()([pooled, inputs[1]]) if kind == "two_inputs" else pooled
    tf.keras.Model(inputs, tf.keras.layers.Dense(CLASSES)(hidden)).save(tmp_path / "t.keras")
    with pytest.raises(UserError, match=r"`teacher`=.*t.keras: "):
        run(tmp_path / "t.keras")


def test_fingerprint_is_of_names_and_contents(tmp_path: Path, teacher_path: Path) -> None:
    copy = Path(shutil.copytree(teacher_path, tmp_path / "elsewhere"))
    assert fingerprint(copy) == fingerprint(teacher_path)
    seen = {fingerprint(copy)}
    (copy / "assets").mkdir(exist_ok=True)
    (copy / "assets" / "labels.txt").write_text("a\nb\n")
    seen.add(fingerprint(copy))
    (copy / "assets" / "labels.txt").rename(copy / "assets" / "names.txt")
    seen.add(fingerprint(copy))
    (copy / "assets" / "names.txt").write_text("a\nB\n")
    seen.add(fingerprint(copy))
    assert len(seen) == 4


def test_fingerprint_does_not_confuse_a_name_with_a_content(tmp_path: Path) -> None:
    first, second = tmp_path / "1", tmp_path / "2"
    for directory, files in ((first, {"a": "b", "c": ""}), (second, {"a": "", "c": "b"})):
        directory.mkdir()
        for name, content in files.items():
            (directory / name).write_text(content)
    assert fingerprint(first) != fingerprint(second)


def test_fingerprint_of_a_file_does_not_count_its_directory(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "t.keras").write_bytes(b"model")
    first, second = (fingerprint(tmp_path / name / "t.keras") for name in ("a", "b"))
    assert first == second


def test_identity(teacher_path: Path) -> None:
    assert load(teacher_path, value_range="0..1").identity(batch_size=16).to_json() == {
        "fingerprint": fingerprint(teacher_path),
        "value_range": "0..1",
        "signature": "serving_default",
        "batch_size": 16,
    }


def test_teacher_weights_are_not_zero() -> None:
    assert all(np.abs(weight).max() > 0 for weight in teacher_weights())
