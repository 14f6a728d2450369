"""trainer.models.initial_weights: every kind of file, by name and by shape; what was not loaded is reported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import pytest
import tensorflow as tf

from pipeline.errors import DataError, UserError
from tests import bit, own_students
from trainer.models.bit import bit as build_bit
from trainer.models.initial_weights import load_initial_weights
from trainer.models.layers import head_layer
from trainer.run.results import export_student

SIZE = 24
layers = tf.keras.layers


def randomized(model: tf.keras.Model) -> tf.keras.Model:
    generator = np.random.default_rng(len(model.name))
    model.set_weights([generator.uniform(0.1, 1, weight.shape) for weight in model.get_weights()])
    return model


def network(num_classes: int = 5) -> tf.keras.Model:
    """A model with automatic names, explicit names and a nested model."""
    model = own_students.nested(num_classes, SIZE)
    model.build([None, SIZE, SIZE, 3])
    return model


def chain(name: str, widths: tuple[int, ...] = (4, 4)) -> tf.keras.Model:
    """A model of 6 weights per width and 2 of the head, with explicit names."""
    image = x = tf.keras.Input((16, 16, 3))
    for number, width in enumerate(widths):
        x = layers.Conv2D(width, 3, name=f"{name}_{number}_convolution")(x)
        x = layers.BatchNormalization(name=f"{name}_{number}_norm")(x)
    return tf.keras.Model(image, layers.Dense(5, name=f"{name}_head")(layers.GlobalAveragePooling2D()(x)))


def save(model: tf.keras.Model, path: Path) -> str:
    if path.name == "exported":
        export_student(model, path)
    elif path.name == "model.h5":
        with pytest.warns(UserWarning, match="HDF5"):
            model.save(path, include_optimizer=False)
    elif path.suffix == ".h5":
        model.save_weights(path)
    else:
        model.save(path)
    return str(path)


def check_equal(got: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", ["a.keras", "a.weights.h5", "weights.h5", "model.h5", "exported"])
def test_all_weights_but_a_head_of_another_width_are_loaded(tmp_path: Path, name: str) -> None:
    source = randomized(network())
    path = save(source, tmp_path / name)
    layers.Dense(1), layers.Conv2D(1, 1), layers.BatchNormalization()  # take automatic names
    same, other = network(), network(7)
    assert load_initial_weights(same, path) == "loaded 14 of 14 weights (14 by name, 0 by shape)"
    check_equal(same.get_weights(), source.get_weights())
    fresh = head_layer(other).get_weights()
    loaded, left = load_initial_weights(other, path).splitlines()
    assert "loaded 12 of 14" in loaded
    for text in ("head/kernel (8, 7)", "(8, 5) in the file", "head/bias (7,)"):
        assert text in left
    check_equal(other.get_weights()[:-2], source.get_weights()[:-2])
    check_equal(head_layer(other).get_weights(), fresh)


@pytest.mark.parametrize("name", ["a.weights.h5", "weights.h5", "a.keras"])
def test_layers_of_other_names_are_loaded_by_shape(tmp_path: Path, name: str) -> None:
    source, target = randomized(chain("theirs")), chain("ours")
    report = load_initial_weights(target, save(source, tmp_path / name))
    assert "loaded 14 of 14" in report
    assert "14 by name" in report if name == "a.weights.h5" else "14 by shape" in report  # names of classes
    check_equal(target.get_weights(), source.get_weights())


def test_ambiguous_shapes_are_not_loaded(tmp_path: Path) -> None:
    target = chain("ours", (4, 6, 6))
    before = target.get_layer("ours_1_norm").get_weights()
    report = load_initial_weights(target, save(chain("theirs", (4, 6)), tmp_path / "weights.h5"))
    assert "loaded 10 of 20" in report
    assert "ours_1_norm/gamma" in report  # two of its shape here, one in the file
    assert "theirs_1_norm/0" in report
    check_equal(target.get_layer("ours_1_norm").get_weights(), before)


def test_few_equal_shapes_are_no_reason_to_load(tmp_path: Path) -> None:
    path = save(chain("theirs", (4, 6, 6)), tmp_path / "weights.h5")
    with pytest.raises(UserError, match="none of its 20 arrays"):
        load_initial_weights(chain("ours", (4, 7, 8)), path)


def test_names_of_the_oldest_published_files_are_understood(tmp_path: Path) -> None:
    target = tf.keras.Sequential([layers.Conv2D(4, 3, name="block1_conv1", input_shape=(8, 8, 3))])
    bias = np.full([4], 2, np.float32)
    with h5py.File(tmp_path / "vgg.h5", "w") as file:
        file.attrs["layer_names"] = [b"block1_conv1"]
        group = file.create_group("block1_conv1")
        group.attrs["weight_names"] = [b"block1_conv1_W_1:0", b"block1_conv1_b_1:0"]
        group["block1_conv1_W_1:0"], group["block1_conv1_b_1:0"] = np.ones([3, 3, 3, 4], np.float32), bias
    assert "2 by name" in load_initial_weights(target, str(tmp_path / "vgg.h5"))
    np.testing.assert_array_equal(target.get_weights()[1], bias)


def test_published_bit_is_loaded_into_a_bit_of_other_classes(npz: Path) -> None:
    model = build_bit(5, 33, depth=bit.UNITS)
    loaded, left = load_initial_weights(model, str(npz)).splitlines()
    assert "0 by shape" in loaded
    assert "head/kernel" in left
    assert "block1" not in left
    assert not head_layer(model).kernel.numpy().any()


def test_file_that_fits_nothing_changes_nothing(tmp_path: Path, npz: Path) -> None:
    target = tf.keras.Sequential(
        [layers.Conv2D(3, 5, input_shape=(8, 8, 3)), layers.Flatten(), layers.Dense(9)]
    )
    before = target.get_weights()
    for path in (save(network(), tmp_path / "a.weights.h5"), str(npz)):
        with pytest.raises(UserError, match=r"`init`=.*none of its \d+ arrays"):
            load_initial_weights(target, path)
    check_equal(target.get_weights(), before)


@pytest.mark.parametrize("name", ["a.h5", "a.keras", "a.npz", "a.txt"])
def test_file_without_weights_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"nonsense")
    with pytest.raises(UserError, match=name):
        load_initial_weights(chain("ours"), str(tmp_path / name))


def test_number_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    source, target = chain("ours"), chain("ours")
    source.layers[-1].bias.assign([1, 2, np.nan, 4, 5])
    before = target.get_weights()
    with pytest.raises(DataError, match="ours_head/bias"):
        load_initial_weights(target, save(source, tmp_path / "a.keras"))
    check_equal(target.get_weights(), before)
