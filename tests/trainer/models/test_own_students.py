"""Students of the user: functions and saved models are checked, and work like built-in students."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from pipeline.errors import UserError
from tests import own_students
from trainer.config.choices import check_student_exists, student_kind
from trainer.models import build_student
from trainer.models.batch_norm import replicas_notice, synchronize
from trainer.models.randomness import Generators
from trainer.run.results import check_export, export_student

CLASSES, SIZE = 5, 24


def build(name: str, **options: object) -> tf.keras.Model:
    return build_student(f"tests.own_students:{name}", num_classes=CLASSES, image_size=SIZE, **options)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("wide", ["(None, 6)", "(None, 5)"]),
        ("softmax", ["probabilities", "logits"]),
        ("sigmoid", ["sigmoid", "logits"]),
        ("larger", ["(None, 32, 32, 3)", "(None, 24, 24, 3)"]),
        ("two_outputs", ["1 inputs", "2 outputs"]),
        ("whole_numbers", ["uint8", "float32"]),
        ("fixed_batch", ["(8, 24, 24, 3)", "(None, 24, 24, 3)"]),
        ("frozen", ["trainable"]),
        ("in_python", ["PyFunc"]),
        ("no_model", ["builtins.int", "tf.keras.Model"]),
        ("failing", ["KeyError", "(5, 24)", "own_students.py"]),
        ("a_number", ["int", "function"]),
        ("widee", ["widee", "did you mean", "tests.own_students:wide"]),
    ],
)
def test_wrong_student_is_refused_in_one_line(name: str, words: list[str]) -> None:
    with pytest.raises(UserError) as raised:
        build(name)
    message = str(raised.value)
    assert message.startswith(f"`student`=tests.own_students:{name}: ")
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_student_that_cannot_be_exported_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="untracked"):
        check_export(build("untracked"), tmp_path, name="tests.own_students:untracked")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("small", "built-in"),
        ("keras:VGG16", "keras"),
        ("my_package.models:build", "function"),
        ("models:Nets.wide", "function"),
        ("runs/student", "path"),
        ("student.keras", "path"),
    ],
)
def test_kinds_of_students(name: str, kind: str) -> None:
    assert student_kind(name) == kind


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("keras:mobilenetv3small", r"did you mean keras:MobileNetV3Small\?"),
        ("keras:GPT", "such as keras:MobileNetV3Small"),
        ("resnet5", "resnet50v2.*keras:NAME.*module:function"),
        ("gs://bucket/student", "on this machine"),
        ("no_such_package.models:build", "no_such_package.*PYTHONPATH"),
        ("nowhere/student", "nowhere/student"),
    ],
)
def test_unknown_student_is_refused_before_anything_is_imported(name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_student_exists(name)


def test_import_error_names_the_missing_module() -> None:
    with pytest.raises(UserError, match=r"no module tests\.no_students.*PYTHONPATH"):
        build_student("tests.no_students:build", num_classes=CLASSES, image_size=SIZE)


def test_module_that_fails_is_named_with_the_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "failing_models.py").write_text("import tensorflow\nimport no_such_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"no_such_package.*failing_models\.py, line 2"):
        build_student("failing_models:build", num_classes=CLASSES, image_size=SIZE)


@pytest.mark.parametrize("name", ["nested", "subclass"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_student_of_a_function_has_the_form_of_all_students(name: str, precision: str) -> None:
    policy = tf.keras.mixed_precision.global_policy()
    tf.keras.utils.set_random_seed(1)
    model = build(name, precision=precision)
    assert tf.keras.mixed_precision.global_policy() is policy
    logits = model(np.full([2, SIZE, SIZE, 3], 200.0, np.float32))
    assert (logits.dtype, logits.shape) == (tf.float32, (2, CLASSES))
    assert {weight.dtype for weight in model.weights} == {tf.float32}
    tf.keras.utils.set_random_seed(1)
    for ours, theirs in zip(model.weights, build(name).weights, strict=True):
        np.testing.assert_array_equal(ours, theirs)  # at any precision


def test_batch_norm_of_a_nested_model_is_synchronized() -> None:
    student = build("nested")
    assert "--sync_batch_norm" in str(replicas_notice(student, batch_size=8, replicas=2))
    synchronized = synchronize(student)
    assert "dropout" in str(replicas_notice(synchronized, batch_size=8, replicas=2))
    assert [w.name for w in synchronized.weights] == [w.name for w in student.weights]
    assert len(Generators(synchronized)) == 1
    images = np.random.default_rng(0).uniform(0, 255, (2, SIZE, SIZE, 3)).astype(np.float32)
    np.testing.assert_allclose(synchronized(images), student(images), rtol=0, atol=1e-6)


def test_batch_norm_inside_a_layer_is_not_synchronized() -> None:
    with pytest.raises(UserError, match=r"subclass.*synchronized=True|subclass.*rebuilt"):
        synchronize(build("subclass"))


def test_dropout_is_a_function_of_the_step() -> None:
    student = build("nested")
    generators = Generators(student)
    images = np.full([1, SIZE, SIZE, 3], 200.0, np.float32)

    def run(step: int) -> np.ndarray:
        generators.reset(tf.constant(step))
        return np.asarray(student(images, training=True))

    before = student.get_weights()
    first, second = run(3), run(4)
    student.set_weights(before)
    assert np.any(first != second)
    np.testing.assert_array_equal(run(3), first)


@pytest.mark.parametrize("form", ["student.keras", "student"])
def test_saved_model_is_a_student_with_its_weights(tmp_path: Path, form: str) -> None:
    original = own_students.nested(CLASSES, SIZE)
    original.build([None, SIZE, SIZE, 3])
    original.save(tmp_path / form)

    def load(num_classes: int = CLASSES, image_size: int = SIZE, **options: object) -> tf.keras.Model:
        path = str(tmp_path / form)
        return build_student(path, num_classes=num_classes, image_size=image_size, **options)

    student = load()
    for ours, theirs in zip(student.weights, original.weights, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    export_student(student, tmp_path / "exported")
    with pytest.raises(UserError, match=r"`precision`=bfloat16.*--init"):
        load(precision="bfloat16")
    with pytest.raises(UserError, match=r"\(None, 5\).*\(None, 7\)"):
        load(num_classes=7)
    with pytest.raises(UserError, match=r"\(None, 24, 24, 3\).*32, 32"):
        load(image_size=32)


def test_saved_model_without_layers_is_refused(teacher_path: Path) -> None:
    with pytest.raises(UserError, match=r"`student`=.*Keras"):
        build_student(str(teacher_path), num_classes=CLASSES, image_size=SIZE)
