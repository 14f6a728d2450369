"""trainer.models.bit: published sizes, an independent float64 forward pass, and published checkpoints."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from pipeline.errors import DataError, UserError
from tests.bit import (
    CLASSES,
    UNITS,
    Arrays,
    convolve,
    group_norm,
    paper_names,
    pictures,
    random_arrays,
    reference,
    relative_error,
    save_npz,
    shapes_of,
    standardized,
)
from trainer.models import STUDENTS, build_student
from trainer.models.bit import GroupNorm, PublishedWeights, StandardizedConv2D, bit, standardize_kernel


@pytest.fixture(scope="module")
def arrays() -> Arrays:
    return random_arrays(shapes_of(UNITS))


@pytest.fixture
def npz(arrays: Arrays, tmp_path: Path) -> Path:
    return save_npz(tmp_path / "bit.npz", arrays)


@pytest.fixture(scope="module")
def small_bit() -> tf.keras.Model:
    """A small BiT for 33 pixels, which gives odd sizes at the strides. The tests load its weights."""
    return bit(CLASSES, 33, depth=UNITS)


# Sizes.

R50X1 = {
    "root_block": 9_408,
    "block1": 214_912,
    "block2": 1_218_048,
    "block3": 7_095_296,
    "block4": 14_958_592,
    "norm-pre-head": 4_096,
    "head": 208_998,
}


def parameters_by_block(model: tf.keras.Model) -> Counter[str]:
    out: Counter[str] = Counter()
    for layer in model.layers:
        if layer.count_params():
            out[layer.name.split("/")[0]] += layer.count_params()
    return out


def test_parameter_counts_of_r50x1_by_block():
    with tf.Graph().as_default():  # shapes of variables, without values
        model = build_student("bit_r50x1", num_classes=102, image_size=128)
    assert parameters_by_block(model) == R50X1
    assert model.count_params() == 23_709_350


def test_parameter_counts_of_r101x3():
    with tf.Graph().as_default():
        counts = parameters_by_block(build_student("bit_r101x3", num_classes=102, image_size=128))
    assert sum(counts.values()) == 382_416_678
    assert sum(counts.values()) - counts["head"] == 381_789_888


@pytest.mark.parametrize(
    "name", ["bit_r50x3", "bit_r101x1", pytest.param("bit_r152x2", marks=pytest.mark.slow)]
)
def test_other_depths_and_widths_have_the_published_shapes(name: str):
    depth, width = map(int, re.findall(r"\d+", name))
    units = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}[depth]
    expected = sum(int(np.prod(shape)) for shape in shapes_of(units, width=width, num_classes=10).values())
    with tf.Graph().as_default():
        assert build_student(name, num_classes=10, image_size=64).count_params() == expected


def test_all_depths_and_widths_are_students():
    assert {f"bit_r{depth}x{width}" for depth in (50, 101, 152) for width in (1, 2, 3)} <= set(STUDENTS)


def test_every_kernel_is_found_by_its_name_and_nothing_else_is(small_bit: tf.keras.Model):
    kernels = [w for w in small_bit.weights if w.name.endswith("kernel:0")]
    assert all(w.shape.rank in (2, 4) for w in kernels)
    assert all(w.shape.rank == 1 for w in small_bit.weights if not w.name.endswith("kernel:0"))


# Forward pass.


def check_against_reference(
    model: tf.keras.Model, arrays: Arrays, path: Path, *, units: tuple[int, ...], size: int
) -> float:
    PublishedWeights(save_npz(path, arrays)).load_into(model)
    images = pictures(3, size)
    return relative_error(model(images).numpy(), reference(arrays, images, units))


def test_logits_agree_with_float64_numpy(small_bit: tf.keras.Model, arrays: Arrays, tmp_path: Path):
    error = check_against_reference(small_bit, arrays, tmp_path / "a.npz", units=UNITS, size=33)
    assert error < 1e-4


def test_logits_of_r50x1_agree_with_float64_numpy(tmp_path: Path):
    units = (3, 4, 6, 3)
    arrays = random_arrays(shapes_of(units, num_classes=10))
    model = build_student("bit_r50x1", num_classes=10, image_size=64)
    error = check_against_reference(model, arrays, tmp_path / "a.npz", units=units, size=64)
    print(f"R50x1 against float64: {error:.1e} of the logits' spread")
    assert error < 1e-4


def test_group_norm_has_the_published_variance_and_epsilon():
    # Two pixels and two channels per group with a variance near epsilon, so that any mistake is visible.
    x = np.random.default_rng(0).normal(1, 3e-3, (2, 1, 2, 64)).astype(np.float32)
    scale, bias = np.linspace(0.5, 2, 64), np.linspace(-1, 1, 64)
    layer = GroupNorm(dtype=tf.float32)
    layer.build(x.shape)
    layer.set_weights([scale, bias])
    error = functools.partial(relative_error, layer(x).numpy())
    assert error(group_norm(x, scale, bias)) < 1e-3  # x has 24 bits and a relative spread of 1/300
    assert error(group_norm(x, scale, bias, epsilon=1e-3)) > 0.1
    assert error(group_norm(x, scale, bias, epsilon=1e-6)) > 0.1
    assert error(group_norm(x, scale, bias, ddof=1)) > 0.1


def test_group_norm_does_not_cancel():
    """The mean is a thousand times the spread, so the mean of squares minus the squared mean would be noise."""
    x = np.random.default_rng(0).normal(1000, 1, (2, 5, 5, 64)).astype(np.float32)
    layer = GroupNorm(dtype=tf.float32)
    assert relative_error(layer(x).numpy(), group_norm(x, np.ones(64), np.zeros(64))) < 1e-3


def test_group_norm_of_a_constant_is_its_bias():
    np.testing.assert_array_equal(GroupNorm(dtype=tf.float32)(tf.fill([1, 2, 2, 32], 7.0)), 0)


def test_standardization_has_the_published_variance_and_epsilon():
    kernel = 1e-5 * np.random.default_rng(0).normal(size=(1, 1, 4, 16)).astype(np.float32)
    error = functools.partial(relative_error, standardize_kernel(kernel).numpy())
    assert error(standardized(kernel)) < 1e-5
    assert error(standardized(kernel, epsilon=1e-5)) > 0.1
    assert error(standardized(kernel, epsilon=1e-12)) > 0.1
    assert error(standardized(kernel, ddof=1)) > 0.1


@pytest.mark.parametrize(("size", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2), (7, 2)])
@pytest.mark.parametrize("side", [1, 2, 7, 8])
def test_convolution_pads_equally_on_all_sides(size: int, stride: int, side: int):
    x = np.random.default_rng(0).normal(size=(2, side, side, 3)).astype(np.float32)
    layer = StandardizedConv2D(5, size, stride=stride)
    got = layer(x).numpy()
    expected = convolve(x, layer.kernel.numpy(), stride)
    assert got.shape == expected.shape
    assert relative_error(got, expected) < 1e-4


@pytest.mark.parametrize("training", [False, True])
def test_logits_do_not_depend_on_the_batch(small_bit: tf.keras.Model, npz: Path, training: bool):
    PublishedWeights(npz).load_into(small_bit)
    batch = pictures(4, 33)
    together = small_bit(batch, training=training).numpy()
    alone = np.concatenate([small_bit(batch[i : i + 1], training=training) for i in range(4)])
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-4)


def test_a_new_model_has_zero_logits():
    np.testing.assert_array_equal(bit(CLASSES, 32, depth=(1,))(pictures(2, 32)), 0)


def test_every_variable_has_a_gradient(small_bit: tf.keras.Model, npz: Path):
    PublishedWeights(npz).load_into(small_bit)
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(small_bit(pictures(2, 33), training=True) ** 2)
    for variable, gradient in zip(
        small_bit.trainable_variables, tape.gradient(loss, small_bit.trainable_variables), strict=True
    ):
        assert np.isfinite(gradient).all(), variable.name
        assert np.abs(gradient).max() > 0, variable.name


@pytest.mark.slow
def test_forward_and_backward_pass_compile_with_xla(small_bit: tf.keras.Model, npz: Path):
    """Compiles for one device with static shapes, as a TPU requires."""
    PublishedWeights(npz).load_into(small_bit)

    def step(images: tf.Tensor) -> tuple[tf.Tensor, list[tf.Tensor]]:
        with tf.GradientTape() as tape:
            logits = small_bit(images, training=True)
            loss = tf.reduce_mean(logits**2)
        return logits, tape.gradient(loss, small_bit.trainable_variables)

    images = tf.constant(pictures(2, 33))
    logits, gradients = step(images)
    compiled_logits, compiled_gradients = tf.function(step, jit_compile=True)(images)
    assert relative_error(compiled_logits.numpy(), logits.numpy()) < 1e-3
    for variable, ours, theirs in zip(
        small_bit.trainable_variables, compiled_gradients, gradients, strict=True
    ):
        assert np.abs(ours - theirs).max() < 1e-2 * np.abs(theirs).max(), variable.name


def test_norms_standardization_and_head_stay_float32_under_mixed_precision(arrays: Arrays, npz: Path):
    before = tf.keras.mixed_precision.global_policy()
    tf.keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        model = bit(CLASSES, 33, depth=UNITS)
    finally:
        tf.keras.mixed_precision.set_global_policy(before)
    PublishedWeights(npz).load_into(model)
    convolution = model.get_layer("block1/unit01/conv2")
    assert (convolution.compute_dtype, convolution.kernel.dtype) == ("bfloat16", tf.float32)
    assert model.get_layer("block1/unit01/gn1").compute_dtype == "float32"
    images = pictures(3, 33)
    logits = model(images)
    assert logits.dtype == tf.float32
    # bfloat16 has 8 bits and these weights amplify errors, so the logits are close but not equal.
    assert 1e-5 < relative_error(logits.numpy(), reference(arrays, images, UNITS)) < 0.2


# Published checkpoints.


def loaded(model: tf.keras.Model, path: Path, **options: bool) -> list[np.ndarray]:
    """The weights of a model after loading into it; all were 9 before."""
    model.set_weights([np.full(w.shape, 9.0) for w in model.weights])
    PublishedWeights(path).load_into(model, **options)
    return model.get_weights()


@pytest.mark.parametrize("layout", ["paper", "params", "opt"])
def test_all_published_layouts_load_the_same_weights(
    small_bit: tf.keras.Model, arrays: Arrays, npz: Path, tmp_path: Path, layout: str
):
    expected = loaded(small_bit, npz)
    other = {
        "paper": paper_names(arrays),
        "params": {f"params/{k}": v for k, v in arrays.items()} | {"opt/0/count": np.array(3)},
        "opt": {f"opt/target/{k}": v for k, v in arrays.items()} | {"opt/state/step": np.array(3)},
    }[layout]
    got = loaded(small_bit, save_npz(tmp_path / "other.npz", other))
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_float16_and_float64_files_are_accepted(small_bit: tf.keras.Model, arrays: Arrays, tmp_path: Path):
    halves = {k: v.astype(np.float16) for k, v in arrays.items()}
    got = loaded(small_bit, save_npz(tmp_path / "a.npz", halves))
    doubles = {k: v.astype(np.float64) for k, v in halves.items()}
    for ours, theirs in zip(got, loaded(small_bit, save_npz(tmp_path / "b.npz", doubles)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_number_of_classes_is_the_head_s(npz: Path, arrays: Arrays, tmp_path: Path):
    assert PublishedWeights(npz).num_classes == CLASSES
    assert PublishedWeights(save_npz(tmp_path / "a.npz", paper_names(arrays))).num_classes == CLASSES
    body = {k: v for k, v in arrays.items() if not k.startswith("head/")}
    assert PublishedWeights(save_npz(tmp_path / "b.npz", body)).num_classes is None


@pytest.mark.parametrize("with_head", [True, False])
def test_new_head_leaves_the_model_s_own(arrays: Arrays, tmp_path: Path, with_head: bool):
    kept = {k: v for k, v in arrays.items() if with_head or not k.startswith("head/")}
    model = bit(CLASSES + 1, 33, depth=UNITS)
    PublishedWeights(save_npz(tmp_path / "a.npz", kept)).load_into(model, new_head=True)
    assert not np.any(model.layers[-1].get_weights()[0])
    np.testing.assert_array_equal(
        model.get_layer("block2/unit02/conv2").get_weights()[0], arrays["block2/unit02/conv2/kernel"]
    )


Change = Callable[[Arrays], Arrays]
CASES: dict[str, tuple[Change, str]] = {
    "missing": (
        lambda a: {k: v for k, v in a.items() if k != "block2/unit01/conv1/kernel"},
        r"block2/unit01/conv1/kernel.*\(1, 1, 256, 128\)",
    ),
    "extra": (
        lambda a: a | {"block2/unit03/conv1/kernel": np.zeros((1, 1, 512, 128), np.float32)},
        r"block2/unit03/conv1/kernel.*\(1, 1, 512, 128\)",
    ),
    "shape": (
        lambda a: a | {"block1/unit01/conv2/kernel": np.zeros((3, 3, 64, 65), np.float32)},
        r"block1/unit01/conv2/kernel.*\(3, 3, 64, 65\).*\(3, 3, 64, 64\)",
    ),
    "classes": (
        lambda a: a | {"head/kernel": np.zeros((512, 9), np.float32), "head/bias": np.zeros(9, np.float32)},
        r"head/kernel.*\(512, 9\).*\(512, 7\).*--new_head.*1 more",
    ),
    "no head": (
        lambda a: {k: v for k, v in a.items() if not k.startswith("head/")},
        r"head/kernel.*\(512, 7\).*--new_head",
    ),
    "integers": (
        lambda a: a | {"norm-pre-head/bias": np.zeros((1, 1, 1, 512), np.int32)},
        "norm-pre-head/bias.*int32.*float",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_fit_is_named_with_both_sides(
    small_bit: tf.keras.Model, arrays: Arrays, tmp_path: Path, case: str
):
    change, message = CASES[case]
    with pytest.raises(UserError, match=message):
        PublishedWeights(save_npz(tmp_path / "a.npz", change(arrays))).load_into(small_bit)


def test_other_depth_is_refused_and_changes_nothing(small_bit: tf.keras.Model, tmp_path: Path):
    before = small_bit.get_weights()
    path = save_npz(tmp_path / "a.npz", random_arrays(shapes_of((2, 2))))
    with pytest.raises(UserError, match=r"bit_r1-2x1.*block1/unit02/.*8 more"):
        PublishedWeights(path).load_into(small_bit)
    for ours, theirs in zip(small_bit.get_weights(), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_number_that_is_not_finite_is_refused(small_bit: tf.keras.Model, arrays: Arrays, tmp_path: Path):
    bad = arrays["head/bias"].copy()
    bad[2] = np.nan
    path = save_npz(tmp_path / "a.npz", arrays | {"head/bias": bad})
    with pytest.raises(DataError, match="head/bias"):
        PublishedWeights(path).load_into(small_bit)


def test_damaged_array_is_refused(small_bit: tf.keras.Model, npz: Path):
    data = bytearray(npz.read_bytes())
    data[len(data) // 2] ^= 255
    npz.write_bytes(data)
    with pytest.raises(DataError, match=re.escape(str(npz))):
        PublishedWeights(npz).load_into(small_bit)


def test_file_that_is_no_npz_is_refused(tmp_path: Path):
    (tmp_path / "a.npz").write_text("not a zip")
    with pytest.raises(UserError, match=r"a\.npz"):
        PublishedWeights(tmp_path / "a.npz")
    with pytest.raises(UserError, match=r"none\.npz"):
        PublishedWeights(tmp_path / "none.npz")
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        PublishedWeights(tmp_path)
