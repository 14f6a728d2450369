"""pipeline.inputs.keras_file: what Keras wrote is loaded, and no file runs code; each hostile file here does so in Keras."""

from __future__ import annotations

import importlib
import io
import json
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from pipeline.errors import UserError
from pipeline.inputs.keras_file import load_keras_file
from pipeline.inputs.teacher import Teacher
from tests.stores import CLASSES, SIZE, keras_teacher
from trainer.models.keras_model import load_keras_model

Edit = Callable[[dict[str, Any]], None]
layers = tf.keras.layers

# A module that anyone may have put beside a file.
_MODULE = "view_distill_test_mark"


def save_plain(path: Path) -> Path:
    """A `.keras` file as Keras writes it."""
    model = tf.keras.Sequential(
        [tf.keras.Input([SIZE, SIZE, 3]), layers.Flatten(), layers.Dense(CLASSES, activation="relu")]
    )
    model.save(path)
    return path


def rewrite(path: Path, edit: Edit, *, metadata: bool = False) -> Path:
    """Changes a `.keras` file's config (or its metadata)."""
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    name = "metadata.json" if metadata else "config.json"
    config = json.loads(content[name])
    edit(config)
    content[name] = json.dumps(config).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return path


def by_name(name: str, module: str = _MODULE) -> dict[str, Any]:
    return {"module": module, "class_name": "function", "config": name, "registered_name": name}


def hdf5(path: Path, mark: Path) -> None:
    """Bytecode of a Lambda layer, for the legacy loader."""
    function = eval(f"lambda x: (__import__('pathlib').Path({str(mark)!r}).touch(), x)[1]")
    image = tf.keras.Input([SIZE, SIZE, 3])
    model = tf.keras.Model(image, layers.Dense(CLASSES)(layers.Flatten()(layers.Lambda(function)(image))))
    with pytest.warns(UserWarning, match="HDF5"):
        model.save(path.with_suffix(".h5"))
    path.with_suffix(".h5").rename(path)


def function_of_a_module(path: Path, mark: Path) -> None:
    def edit(config: dict[str, Any]) -> None:
        config["config"]["layers"][-1]["config"]["activation"] = by_name("relu")

    rewrite(save_plain(path), edit)


def class_of_a_module(path: Path, mark: Path) -> None:
    def edit(config: dict[str, Any]) -> None:
        config.update(module=_MODULE, class_name="Sequential", registered_name="Sequential")

    rewrite(save_plain(path), edit)


def legacy_layer(path: Path, mark: Path) -> None:
    """A layer without a module goes to the legacy deserializer; its function comes from any module."""

    def edit(config: dict[str, Any]) -> None:
        of_lambda = {"name": "l", "function": by_name("relu"), "function_type": "function", "arguments": {}}
        of_lambda |= {"output_shape": None, "output_shape_type": "raw", "output_shape_module": None}
        config["config"]["layers"].insert(1, {"class_name": "Lambda", "config": of_lambda})

    rewrite(save_plain(path), edit)


def operation(name: str, path: Path, *arguments: Any, **keywords: Any) -> None:
    """A function of TensorFlow or Keras, by name, of constants: runs while the model is rebuilt."""
    image = tf.keras.Input([SIZE, SIZE, 3])
    tf.keras.Model(image, layers.Dense(CLASSES)(layers.Flatten()(image))).save(path)
    layer = {
        "module": "keras.src.layers.core.tf_op_layer",
        "class_name": "TFOpLambda",
        "config": {"name": "operation", "trainable": True, "dtype": "float32", "function": name},
        "registered_name": "TFOpLambda",
        "name": "operation",
        "inbound_nodes": [["_CONSTANT_VALUE", -1, arguments[0], keywords]],
    }
    rewrite(path, lambda config: config["config"]["layers"].append(layer))


def write_file(path: Path, mark: Path) -> None:
    operation("io.write_file", path, str(mark), contents="code ran")


def get_file(path: Path, mark: Path) -> None:
    operation(
        "keras.utils.get_file",
        path,
        mark.name,
        origin=f"file://{Path(__file__).resolve()}",
        cache_dir=str(mark.parent),
        cache_subdir="",
    )


def pickled_weights(path: Path, mark: Path) -> None:
    class Touch:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (mark,)

    with zipfile.ZipFile(save_plain(path)) as archive:
        content = {name: archive.read(name) for name in archive.namelist() if not name.endswith(".h5")}
    file = io.BytesIO()
    np.savez(file, **{"__root__": np.array(Touch(), object), "layers/dense": np.array(Touch(), object)})
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (content | {"model.weights.npz": file.getvalue()}).items():
            archive.writestr(name, data)


HOSTILE = {
    "hdf5": hdf5,
    "function_of_a_module": function_of_a_module,
    "class_of_a_module": class_of_a_module,
    "legacy_layer": legacy_layer,
    "write_file": write_file,
    "get_file": get_file,
    "pickled_weights": pickled_weights,
}


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that is there once code of a model file ran; importing `_MODULE` is such code."""
    path = tmp_path / "mark"
    (tmp_path / f"{_MODULE}.py").write_text(
        f"import pathlib\nimport tensorflow as tf\npathlib.Path({str(path)!r}).touch()\n"
        "relu, Sequential = tf.nn.relu, tf.keras.Sequential\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield path
    sys.modules.pop(_MODULE, None)


@pytest.mark.parametrize("kind", HOSTILE)
def test_no_code_of_a_file_runs(tmp_path: Path, mark: Path, kind: str) -> None:
    path = tmp_path / "t.keras"
    HOSTILE[kind](path, mark)
    mark.unlink(missing_ok=True)
    for load in (
        lambda: load_keras_file(path, parameter="teacher"),
        lambda: Teacher(path, image_size=SIZE, num_classes=CLASSES),
        lambda: load_keras_model(str(path), parameter="init"),
    ):
        with pytest.raises(UserError, match=r"t\.keras"):
            load()
        assert not mark.exists()
    # The file is what it is meant to be: Keras's safe mode lets it leave its mark.
    try:
        tf.keras.models.load_model(path, compile=False, safe_mode=True)
    except (ValueError, TypeError, KeyError, AttributeError):
        assert mark.exists()
    assert mark.exists()


@pytest.mark.parametrize(
    "found",
    [
        by_name("system", "os"),
        by_name("exec", "builtins"),
        by_name("enable_unsafe_deserialization", "keras.src.saving.serialization_lib"),
        by_name("get_file", "keras.utils"),
        {"class_name": "__lambda__", "config": {"value": "4wE="}},
        {"class_name": "Lambda", "config": {}, "registered_name": "Custom>Adam"},
        {"class_name": "ResidualWrapper", "config": {}, "module": "keras.src.layers.rnn.cell_wrappers"},
        {"class_name": "StringLookup", "config": {"vocabulary": "/etc/passwd"}, "module": "keras.layers"},
        {"class_name": "InstanceMethod", "config": {}, "module": "keras.src.layers.core.tf_op_layer"},
        {"class_name": ["Dense"], "config": {}, "module": "keras.layers"},
        {"class_name": "Dense", "config": {}, "module": {"class_name": "Dense"}},
    ],
    ids=lambda found: str(found["config"] if found["class_name"] == "function" else found["class_name"]),
)
def test_what_is_not_on_the_list_is_refused_wherever_it_stands(tmp_path: Path, found: dict[str, Any]) -> None:
    path = rewrite(
        save_plain(tmp_path / "t.keras"), lambda config: config.update(build_config={"a": [{"b": found}]})
    )
    with pytest.raises(UserError, match="could run code"):
        load_keras_file(path, parameter="teacher")


def test_what_keras_wrote_is_loaded(tmp_path: Path) -> None:
    """Operations by name, a compiled model inside, half precision, regularizers and constraints."""
    image = tf.keras.Input([SIZE, SIZE, 3])
    x = tf.cast(image, tf.float32)[:, 1:] / 255.0 - 0.5
    x = layers.Conv2D(4, 3, kernel_regularizer="l2", activation=tf.nn.swish, dtype="mixed_bfloat16")(x)
    x = layers.BatchNormalization()(tf.nn.relu(tf.concat([x, x], -1)))
    inner = tf.keras.Sequential([layers.Dense(4, activation="gelu", input_shape=(8,)), layers.Dropout(0.1)])
    inner.compile("adam", tf.keras.losses.CategoricalCrossentropy(), metrics=["accuracy"])
    x = inner(layers.GlobalAveragePooling2D()(x))
    model = tf.keras.Model(image, layers.Dense(CLASSES, kernel_constraint="max_norm")(x))
    model.compile(tf.keras.optimizers.Adam(tf.keras.optimizers.schedules.CosineDecay(0.1, 10)), "mse")
    model.save(tmp_path / "t.keras")
    views = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3)).astype(np.float32)
    loaded = load_keras_file(tmp_path / "t.keras", parameter="teacher")
    np.testing.assert_array_equal(loaded(views), model(views))


def test_a_file_of_keras_3_is_one_line(tmp_path: Path) -> None:
    def edit(config: dict[str, Any]) -> None:
        config["keras_version"] = "3.4.1"

    path = rewrite(save_plain(tmp_path / "t.keras"), edit, metadata=True)
    with pytest.raises(UserError, match=r"Keras 3\.4\.1.*model\.export") as caught:
        load_keras_file(path, parameter="teacher")
    assert len(str(caught.value)) < 300 + len(str(path))


def test_an_unbuilt_sequential_is_refused(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="not yet been built"):
        tf.keras.Sequential([layers.Flatten(), layers.Dense(CLASSES)]).save(tmp_path / "t.keras")
    with pytest.raises(UserError, match=r"`teacher`=.*t\.keras: .*build"):
        Teacher(tmp_path / "t.keras", image_size=SIZE, num_classes=CLASSES)


def test_an_hdf5_file_is_no_network_to_begin_with(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="HDF5"):
        keras_teacher().save(tmp_path / "t.h5")
    with pytest.raises(UserError, match=r"SavedModel directory or a \.keras file"):
        load_keras_model(str(tmp_path / "t.h5"), parameter="init")
