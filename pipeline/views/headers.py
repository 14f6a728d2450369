"""What the headers of encoded images say, without decoding them."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence

import numpy as np

from pipeline.errors import DataError

_PNG = b"\x89PNG\r\n\x1a\n"


def has_16_bits(encoded: bytes) -> bool:
    """Whether an image is a PNG of 16 bits per channel, by its header."""
    return encoded.startswith(_PNG) and encoded[24:25] == b"\x10"


def _size(encoded: bytes) -> tuple[int, int]:
    """Height and width of one image.

    A PNG's IHDR is read here: Pillow also inflates text and color profiles, and refuses large ones, which TF ignores.
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
    """Heights and widths in pixels from the images' headers: int32 [n, 2]; TF decodes no orientation tag."""
    from PIL import Image

    out = np.empty((len(encoded), 2), np.int32)
    for row, data in enumerate(encoded):
        try:
            out[row] = _size(data)
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"image {row} of the batch has no readable header: {error}") from error
        except Image.DecompressionBombError as error:
            raise DataError(
                f"image {row} of the batch has more pixels than are ever decoded ({error}); scale it down"
            ) from error
    return out
