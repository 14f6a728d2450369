"""BiT checkpoints in the published formats, and their network in float64 NumPy, independent of `trainer.models.bit`."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

Arrays = dict[str, np.ndarray]

UNITS = (1, 2)  # two small blocks: 0.6 million parameters
CLASSES = 7


def shapes_of(
    units: tuple[int, ...], *, width: int = 1, num_classes: int | None = CLASSES
) -> dict[str, tuple]:
    """Names and shapes of a big_vision checkpoint, according to the paper, not to our model."""
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
    """Random float32 weights. Those that feed the residual stream are so small that the epsilon of the standardization matters."""
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
    """A checkpoint in the paper's format: other names, scales of rank 1, a convolution as head."""
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


# The network in float64 NumPy, according to the paper.


def windows(x: np.ndarray, size: int, stride: int, pad: int) -> np.ndarray:
    """Windows of a zero-padded input: [B, H, W, D] to [B, H', W', D, size, size]."""
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
    """Logits, float64 [B, C], for images in 0..255."""

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
    """Largest difference relative to the standard deviation of the expected values."""
    return float(np.abs(got - expected).max() / expected.std())
