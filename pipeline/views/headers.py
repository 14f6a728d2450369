"""Sizes and bit depths from the headers of encoded images, without decoding them."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence

import numpy as np

from pipeline.errors import DataError

_PNG = b"\x89PNG\r\n\x1a\n"


def has_16_bits(encoded: bytes) -> bool:
    """Whether an image is a PNG with 16 bits per channel, according to its header."""
    return encoded.startswith(_PNG) and encoded[24:25] == b"\x10"


def _size(encoded: bytes) -> tuple[int, int]:
    """Height and width of one image.

    The IHDR of a PNG is parsed here. Pillow also inflates texts and color profiles and rejects large ones, which TF ignores.
    """
    from PIL import Image

    if encoded.startswith(_PNG):
        if len(encoded) < 33 or encoded[12:16] != b"IHDR":
            raise ValueError("a PNG without IHDR")
        width, height = struct.unpack(">II", encoded[16:24])
        if Image.MAX_IMAGE_PIXELS is not None and height * width > 2 * Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError(f"{height} x {width} pixels")
        return height, width
    with Image.open(io.BytesIO(encoded)) as image:
        return image.height, image.width


def image_sizes(encoded: Sequence[bytes]) -> np.ndarray:
    """Heights and widths of encoded images in pixels: int32 [n, 2]. Orientation tags are ignored, as in TF's decoders.

    Raises:
      DataError: an image has no readable header, or too many pixels.
    """
    from PIL import Image

    out = np.empty((len(encoded), 2), np.int32)
    for row, data in enumerate(encoded):
        try:
            out[row] = _size(data)
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"image {row} of the batch has no readable header: {error}") from error
        except Image.DecompressionBombError as error:
            raise DataError(
                f"image {row} of the batch has too many pixels ({error}); scale it down"
            ) from error
    return out
