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
from trainer.models import STUDENTS, build
from trainer.models.bit import (
    GroupNorm,
    PublishedWeights,
    StandardizedConv2D,
    bit,
    standardize_kernel,
)

Arrays = dict[str, np.ndarray]

UNITS = (1, 2)  # two small blocks: 0.6 million parameters
CLASSES = 7


def shapes_of(
    units: tuple[int, ...], *, width: int = 1, num_classes: int | None = CLASSES
) -> dict[str, tuple]:
    """Names and shapes of a big_vision checkpoint, from the paper and not from our model."""
    channels = 64 * width
    out: dict[str, tuple] = {"root_block/conv_root/kernel": (7, 7, 3, channels)}
    for block, count in enumerate(units):
        middle = 64 * width * 2**block
        for unit in range(count):
            name = f"block{block + 1}/unit{unit + 1:02d}"
            for number, norm in ((1, channels), (2, middle), (3, middle)):
                out |= {f"{name}/gn{number}/{what}": (1, 1, 1, norm) for what in ("scale", "bias")}
            out[f"{name}/conv1/kernel"] = (1, 1, channels, middle)
            out[f"{name}/conv2/kernel"] = (3, 3, middle, middle)
            out[f"{name}/conv3/kernel"] = (1, 1, middle, 4 * middle)
            if unit == 0:
                out[f"{name}/conv_proj/kernel"] = (1, 1, channels, 4 * middle)
            channels = 4 * middle
    out |= {f"norm-pre-head/{what}": (1, 1, 1, channels) for what in ("scale", "bias")}
    if num_classes is not None:
        out |= {"head/kernel": (channels, num_classes), "head/bias": (num_classes,)}
    return out


def random_arrays(shapes: dict[str, tuple], *, seed: int = 0) -> Arrays:
    """float32 weights; what joins the residual stream is so small that the standardisation's epsilon counts."""
    generator = np.random.default_rng(seed)
    out = {}
    for name, shape in shapes.items():
        array = generator.normal(size=shape)
        if re.search(r"conv3|conv_proj|conv_root", name):
            array *= 1e-5 * generator.uniform(0.3, 3, shape[-1])  # a variance of about 1e-10
        elif name.endswith("scale"):
            array = 1 + 0.2 * array
        elif name.endswith("bias"):
            array *= 0.2
        out[name] = array.astype(np.float32)
    return out


def save_npz(path: Path, arrays: Arrays) -> Path:
    np.savez(path, **arrays)
    return path


def paper_names(arrays: Arrays) -> Arrays:
    """A checkpoint as the paper's own files have it: other names, scales of rank 1, a convolution for a head."""
    out, group = {}, {"1": "a", "2": "b", "3": "c"}
    for name, array in arrays.items():
        new = name
        for pattern, replacement in (
            (r"root_block/conv_root/", r"root_block/standardized_conv2d/"),
            (r"/conv_proj/", r"/a/proj/standardized_conv2d_17/"),
            (r"/conv(\d)/", lambda m: f"/{group[m[1]]}/standardized_conv2d/"),
            (r"/gn(\d)/", lambda m: f"/{group[m[1]]}/group_norm/"),
            (r"norm-pre-head/", "group_norm/"),
            (r"group_norm/scale", "group_norm/gamma"),
            (r"group_norm/bias", "group_norm/beta"),
            (r"head/(kernel|bias)$", r"head/conv2d/\1"),
        ):
            new = re.sub(pattern, replacement, new)
        shape = array.shape[-1:] if "group_norm" in new else array.shape
        out[f"resnet/{new}"] = array.reshape((1, 1, *shape) if new == "head/conv2d/kernel" else shape)
    return out


# The network in float64 NumPy, from the paper and bit_paper's description of it.


def windows(x: np.ndarray, size: int, stride: int, pad: int) -> np.ndarray:
    """[B, H, W, D] to [B, H', W', D, size, size], zeros around."""
    x = np.pad(x, [(0, 0), (pad, pad), (pad, pad), (0, 0)])
    return np.lib.stride_tricks.sliding_window_view(x, (size, size), (1, 2))[:, ::stride, ::stride]


def standardized(kernel: np.ndarray, *, epsilon: float = 1e-10, ddof: int = 0) -> np.ndarray:
    kernel = kernel.astype(np.float64)
    axes = (0, 1, 2)
    deviation = np.sqrt(kernel.var(axes, ddof=ddof) + epsilon)
    return (kernel - kernel.mean(axes)) / deviation


def convolve(x: np.ndarray, kernel: np.ndarray, stride: int = 1) -> np.ndarray:
    size = len(kernel)
    columns = windows(x, size, stride, size // 2)  # [B, H, W, D, size, size]
    return np.tensordot(columns, standardized(kernel).transpose(2, 0, 1, 3), 3)


def group_norm(
    x: np.ndarray, scale: np.ndarray, bias: np.ndarray, *, epsilon: float = 1e-5, ddof: int = 0
) -> np.ndarray:
    grouped = x.astype(np.float64).reshape(*x.shape[:3], 32, -1)
    mean = grouped.mean((1, 2, 4), keepdims=True)
    deviation = np.sqrt(grouped.var((1, 2, 4), keepdims=True, ddof=ddof) + epsilon)
    return ((grouped - mean) / deviation).reshape(x.shape) * scale.reshape(-1) + bias.reshape(-1)


def reference(arrays: Arrays, images: np.ndarray, units: tuple[int, ...]) -> np.ndarray:
    """Logits float64 [B, C] of images in 0..255."""

    def norm_relu(x: np.ndarray, name: str) -> np.ndarray:
        return np.maximum(group_norm(x, arrays[f"{name}/scale"], arrays[f"{name}/bias"]), 0)

    x = convolve(images.astype(np.float64) / 127.5 - 1, arrays["root_block/conv_root/kernel"], 2)
    x = windows(x, 3, 2, 1).max((-2, -1))
    for block, count in enumerate(units):
        for unit in range(count):
            name, stride = f"block{block + 1}/unit{unit + 1:02d}", 2 if block and not unit else 1
            y = norm_relu(x, f"{name}/gn1")
            if unit == 0:
                x = convolve(y, arrays[f"{name}/conv_proj/kernel"], stride)
            y = norm_relu(convolve(y, arrays[f"{name}/conv1/kernel"]), f"{name}/gn2")
            y = norm_relu(convolve(y, arrays[f"{name}/conv2/kernel"], stride), f"{name}/gn3")
            x = x + convolve(y, arrays[f"{name}/conv3/kernel"])
    x = norm_relu(x, "norm-pre-head").mean((1, 2))
    return x @ arrays["head/kernel"].astype(np.float64) + arrays["head/bias"]


def pictures(count: int, size: int, *, seed: int = 0) -> np.ndarray:
    """float32 [count, size, size, 3] in 0..255."""
    return np.random.default_rng(seed).uniform(0, 255, (count, size, size, 3)).astype(np.float32)


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference, as a share of the spread of what is expected."""
    return float(np.abs(got - expected).max() / expected.std())


@pytest.fixture(scope="module")
def arrays() -> Arrays:
    return random_arrays(shapes_of(UNITS))


@pytest.fixture
def npz(arrays: Arrays, tmp_path: Path) -> Path:
    return save_npz(tmp_path / "bit.npz", arrays)


@pytest.fixture(scope="module")
def small_bit() -> tf.keras.Model:
    """At 33 pixels: odd sizes at the strides. Weights are loaded by the tests."""
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
    with tf.Graph().as_default():  # builds the variables' shapes and no values
        model = build("bit_r50x1", num_classes=102, image_size=128)
    assert parameters_by_block(model) == R50X1
    assert model.count_params() == 23_709_350


def test_parameter_counts_of_r101x3():
    with tf.Graph().as_default():
        counts = parameters_by_block(build("bit_r101x3", num_classes=102, image_size=128))
    assert sum(counts.values()) == 382_416_678
    assert sum(counts.values()) - counts["head"] == 381_789_888


@pytest.mark.parametrize("name", ["bit_r50x3", "bit_r101x1", "bit_r152x2"])
def test_other_depths_and_widths_have_the_published_shapes(name: str):
    depth, width = map(int, re.findall(r"\d+", name))
    units = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}[depth]
    expected = sum(int(np.prod(shape)) for shape in shapes_of(units, width=width, num_classes=10).values())
    with tf.Graph().as_default():
        assert build(name, num_classes=10, image_size=64).count_params() == expected


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
    model = build("bit_r50x1", num_classes=10, image_size=64)
    error = check_against_reference(model, arrays, tmp_path / "a.npz", units=units, size=64)
    print(f"R50x1 against float64: {error:.1e} of the logits' spread")
    assert error < 1e-4


def test_group_norm_has_the_published_variance_and_epsilon():
    # Two pixels and two channels a group, of a variance near epsilon: each mistake shows.
    x = np.random.default_rng(0).normal(1, 3e-3, (2, 1, 2, 64)).astype(np.float32)
    scale, bias = np.linspace(0.5, 2, 64), np.linspace(-1, 1, 64)
    layer = GroupNorm(dtype=tf.float32)
    layer.build(x.shape)
    layer.set_weights([scale, bias])
    error = functools.partial(relative_error, layer(x).numpy())
    assert error(group_norm(x, scale, bias)) < 1e-3  # x has 24 bits, and a spread of 1/300
    assert error(group_norm(x, scale, bias, epsilon=1e-3)) > 0.1
    assert error(group_norm(x, scale, bias, epsilon=1e-6)) > 0.1
    assert error(group_norm(x, scale, bias, ddof=1)) > 0.1


def test_group_norm_does_not_cancel():
    """A mean a thousand times the spread: the mean of squares less the squared mean would be noise."""
    x = np.random.default_rng(0).normal(1000, 1, (2, 5, 5, 64)).astype(np.float32)
    layer = GroupNorm(dtype=tf.float32)
    assert relative_error(layer(x).numpy(), group_norm(x, np.ones(64), np.zeros(64))) < 1e-3


def test_group_norm_of_a_constant_is_its_bias():
    np.testing.assert_array_equal(GroupNorm(dtype=tf.float32)(tf.fill([1, 2, 2, 32], 7.0)), 0)


def test_group_norm_refuses_channels_that_do_not_divide():
    with pytest.raises(UserError, match="33 channels do not divide into 32 groups"):
        GroupNorm(dtype=tf.float32)(tf.zeros([1, 2, 2, 33]))


def test_standardisation_has_the_published_variance_and_epsilon():
    kernel = 1e-5 * np.random.default_rng(0).normal(size=(1, 1, 4, 16)).astype(np.float32)
    error = functools.partial(relative_error, standardize_kernel(kernel).numpy())
    assert error(standardized(kernel)) < 1e-5
    assert error(standardized(kernel, epsilon=1e-5)) > 0.1
    assert error(standardized(kernel, epsilon=1e-12)) > 0.1
    assert error(standardized(kernel, ddof=1)) > 0.1


@pytest.mark.parametrize(("size", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2), (7, 2)])
@pytest.mark.parametrize("side", [1, 2, 7, 8])
def test_convolution_pads_alike_on_all_sides(size: int, stride: int, side: int):
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


def test_every_variable_but_the_body_behind_a_zero_head_has_a_gradient(small_bit: tf.keras.Model, npz: Path):
    PublishedWeights(npz).load_into(small_bit)
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(small_bit(pictures(2, 33), training=True) ** 2)
    for variable, gradient in zip(
        small_bit.trainable_variables, tape.gradient(loss, small_bit.trainable_variables), strict=True
    ):
        assert np.isfinite(gradient).all(), variable.name
        assert np.abs(gradient).max() > 0, variable.name


def test_norms_standardisation_and_head_stay_float32_under_mixed_precision(arrays: Arrays, npz: Path):
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
    # bfloat16 has 8 bits, and these weights amplify: near, and not equal.
    assert 1e-5 < relative_error(logits.numpy(), reference(arrays, images, UNITS)) < 0.2


@pytest.mark.parametrize("depth", [18, (), (1, 0), 0])
def test_unknown_depth_is_refused(depth: int | tuple[int, ...]):
    with pytest.raises(UserError, match="depth must be one of 50, 101, 152"):
        bit(CLASSES, 32, depth=depth)


def test_impossible_width_is_refused():
    with pytest.raises(UserError, match="width must be >= 1; got 0"):
        bit(CLASSES, 32, width=0)


# Published checkpoints.


def loaded(model: tf.keras.Model, path: Path, **options: bool) -> list[np.ndarray]:
    """The model's weights after loading, from others before."""
    model.set_weights([np.full(w.shape, 9.0) for w in model.weights])
    PublishedWeights(path).load_into(model, **options)
    return model.get_weights()


@pytest.mark.parametrize("layout", ["paper", "params", "opt"])
def test_all_published_layouts_load_alike(
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


def test_float16_and_float64_files_are_taken(small_bit: tf.keras.Model, arrays: Arrays, tmp_path: Path):
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
        r"block2/unit01/conv1/kernel is not there, expected \(1, 1, 256, 128\)",
    ),
    "extra": (
        lambda a: a | {"block2/unit03/conv1/kernel": np.zeros((1, 1, 512, 128), np.float32)},
        r"block2/unit03/conv1/kernel \(1, 1, 512, 128\) is there, the model has no such array",
    ),
    "shape": (
        lambda a: a | {"block1/unit01/conv2/kernel": np.zeros((3, 3, 64, 65), np.float32)},
        r"block1/unit01/conv2/kernel is \(3, 3, 64, 65\) there, expected \(3, 3, 64, 64\)",
    ),
    "classes": (
        lambda a: a | {"head/kernel": np.zeros((512, 9), np.float32), "head/bias": np.zeros(9, np.float32)},
        r"head/kernel is \(512, 9\) there, expected \(512, 7\); pass --new_head .* \(and 1 more differ\)",
    ),
    "no head": (
        lambda a: {k: v for k, v in a.items() if not k.startswith("head/")},
        r"head/kernel is not there, expected \(512, 7\); pass --new_head",
    ),
    "integers": (
        lambda a: a | {"norm-pre-head/bias": np.zeros((1, 1, 1, 512), np.int32)},
        "norm-pre-head/bias is int32, expected a float type",
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
    with pytest.raises(UserError, match=r"does not fit bit_r1-2x1: block1/unit02/.* \(and 8 more differ\)"):
        PublishedWeights(path).load_into(small_bit)
    for ours, theirs in zip(small_bit.get_weights(), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_number_that_is_not_finite_is_refused(small_bit: tf.keras.Model, arrays: Arrays, tmp_path: Path):
    bad = arrays["head/bias"].copy()
    bad[2] = np.nan
    path = save_npz(tmp_path / "a.npz", arrays | {"head/bias": bad})
    with pytest.raises(DataError, match="head/bias holds a number that is not finite"):
        PublishedWeights(path).load_into(small_bit)


def test_damaged_array_is_refused(small_bit: tf.keras.Model, npz: Path):
    data = bytearray(npz.read_bytes())
    data[len(data) // 2] ^= 255
    npz.write_bytes(data)
    with pytest.raises(DataError, match="is damaged"):
        PublishedWeights(npz).load_into(small_bit)


def test_file_that_is_no_npz_is_refused(tmp_path: Path):
    (tmp_path / "a.npz").write_text("not a zip")
    with pytest.raises(UserError, match=r"a\.npz: cannot be read as \.npz"):
        PublishedWeights(tmp_path / "a.npz")
    with pytest.raises(UserError, match=r"none\.npz: no such file; expected a BiT checkpoint"):
        PublishedWeights(tmp_path / "none.npz")
    with pytest.raises(UserError, match=r"cannot be read as \.npz"):
        PublishedWeights(tmp_path)
