"""Synthetic photo-like images of all kinds that a data set may contain, made with Pillow."""

from __future__ import annotations

import io

import numpy as np
import tensorflow as tf
from PIL import Image
from PIL.PngImagePlugin import PngInfo


def photo(height: int, width: int, *, seed: int, grain: float = 12) -> np.ndarray:
    """An image with soft shapes, a hard edge and noise of a standard deviation: uint8 [height, width, 3]."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (5, 6, 3), np.uint8))
    soft = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    soft[:, width // 3 : width // 2 + 1] = soft[:, width // 3 : width // 2 + 1, ::-1] // 2
    noise = generator.normal(0, grain, soft.shape).astype(np.int16)
    return np.clip(soft + noise, 0, 255).astype(np.uint8)


def encode(pixels: np.ndarray, kind: str) -> bytes:
    """Encodes uint8 [H, W, 3] as one of `KINDS`."""
    image = Image.fromarray(pixels)
    mode, file_format, options = KINDS[kind]
    if mode == "RGBA":
        image.putalpha(Image.fromarray(pixels[..., 0]))
    elif mode == "I;16":
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
    file = io.BytesIO()
    if kind == "png_long_text":
        options = {"pnginfo": PngInfo()}
        options["pnginfo"].add_text("history", "edited " * 300_000, zip=True)
    image.save(file, file_format, **options)
    return file.getvalue()


KINDS: dict[str, tuple[str, str, dict[str, object]]] = {
    "jpeg_420": ("RGB", "JPEG", {"subsampling": 2, "quality": 90}),
    "jpeg_411": ("RGB", "JPEG", {"subsampling": "4:1:1", "quality": 90}),
    "jpeg_422": ("RGB", "JPEG", {"subsampling": 1, "quality": 90}),
    "jpeg_444": ("RGB", "JPEG", {"subsampling": 0, "quality": 90}),
    "jpeg_grey": ("L", "JPEG", {"quality": 90}),
    "jpeg_progressive": ("RGB", "JPEG", {"progressive": True, "quality": 85}),
    "jpeg_progressive_grey": ("L", "JPEG", {"progressive": True, "quality": 85}),
    "jpeg_restarts": ("RGB", "JPEG", {"restart_marker_rows": 1, "quality": 90}),
    "jpeg_cmyk": ("CMYK", "JPEG", {"quality": 90}),
    "png_rgb": ("RGB", "PNG", {}),
    "png_grey": ("L", "PNG", {}),
    "png_palette": ("P", "PNG", {}),
    "png_rgba": ("RGBA", "PNG", {}),
    "png_16": ("I;16", "PNG", {}),
    "png_long_text": ("RGB", "PNG", {}),  # a compressed text chunk of 2 MB, more than Pillow accepts
    "gif": ("P", "GIF", {}),
    "bmp": ("RGB", "BMP", {}),
}

# (kind, height, width) of the examples in the splits of the test data set. Some are one pixel high or wide.
TRAIN_IMAGES = [
    ("jpeg_420", 61, 83),
    ("jpeg_422", 64, 48),
    ("jpeg_444", 57, 75),
    ("jpeg_grey", 49, 66),
    ("jpeg_progressive", 71, 53),
    ("png_rgb", 33, 45),
    ("png_grey", 40, 31),
    ("jpeg_420", 1, 53),
    ("png_rgb", 1, 37),
    ("jpeg_422", 63, 1),
    ("jpeg_420", 97, 65),
    ("jpeg_420", 17, 19),
    ("jpeg_444", 80, 80),
    ("jpeg_progressive", 50, 90),
    ("png_rgb", 7, 5),
    ("jpeg_420", 120, 90),
    ("jpeg_422", 55, 101),
]
TEST_IMAGES = [
    ("jpeg_420", 60, 80),
    ("png_grey", 28, 28),
    ("jpeg_444", 41, 77),
    ("png_rgb", 30, 50),
    ("jpeg_grey", 66, 44),
    ("jpeg_progressive", 52, 52),
    ("jpeg_422", 39, 71),
]


def encoded_images(images: list[tuple[str, int, int]], *, seed: int = 0) -> list[bytes]:
    """The encoded images of a split."""
    return [
        encode(photo(height, width, seed=1000 * seed + i), kind)
        for i, (kind, height, width) in enumerate(images)
    ]


class ImageList:
    """Encoded images in memory; implements `pipeline.views.source.EncodedImages` and counts reads."""

    def __init__(self, images: list[bytes]) -> None:
        self.images = images
        self.num_examples = len(images)
        self.num_read = 0

    def read(self, examples: np.ndarray) -> list[bytes]:
        self.num_read += len(examples)
        return [self.images[int(example)] for example in examples]


def pictures(count: int, size: int) -> tf.Tensor:
    """Random images, float32 [count, size, size, 3] in 0..255."""
    return tf.constant(np.random.default_rng(0).uniform(0, 255, (count, size, size, 3)).astype(np.float32))
