"""What the headers of encoded images say, without decoding them."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np

from pipeline.errors import DataError


def has_16_bits(encoded: bytes) -> bool:
    """Whether an image is a PNG of 16 bits per channel, by its header."""
    return encoded.startswith(b"\x89PNG\r\n\x1a\n") and encoded[24:25] == b"\x10"


def image_sizes(encoded: Sequence[bytes]) -> np.ndarray:
    """Heights and widths in pixels from the images' headers: int32 [n, 2]; TF decodes no orientation tag."""
    from PIL import Image  # reads headers only, of every format that TF decodes

    out = np.empty((len(encoded), 2), np.int32)
    for row, data in enumerate(encoded):
        try:
            with Image.open(io.BytesIO(data)) as image:
                out[row] = image.height, image.width
        except (OSError, SyntaxError) as error:
            raise DataError(f"image {row} of the batch has no readable header: {error}") from error
        except Image.DecompressionBombError as error:
            raise DataError(
                f"image {row} of the batch has more pixels than are ever decoded ({error}); scale it down"
            ) from error
    return out
