"""Image files on their way into a data set: what cannot be used, what would surprise, and the changes that are offered.

TensorFlow's decoders, by which teacher and students see the images, ignore an EXIF orientation and drop an alpha channel.
Files are kept byte for byte unless a change is asked for.
"""

from __future__ import annotations

import dataclasses
import io
import re
from pathlib import Path

import numpy as np
import tensorflow as tf
from PIL import Image, ImageOps

from pipeline.errors import DataError
from pipeline.errors.causes import first_line
from pipeline.views.headers import has_16_bits, image_sizes
from pipeline.views.render import decode

_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")
_CONVERTIBLE = ("WEBP", "TIFF", "BMP", "GIF")
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX")  # Pillow's, of 8 bits per channel, without CMYK
_ORIENTATION = 0x0112  # EXIF tag; 2 to 8 are turned or mirrored
_JPEG_QUALITY = 95
_TF_DECORATION = re.compile(r"\{\{.*?\}\}|\[Op:\w+\]|, size \d+ +name:")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Changes:
    """What is changed in the images that need it; by default nothing.

    Attributes:
      apply_orientation: turn images upright by their EXIF orientation.
      flatten_alpha: put images with transparent pixels onto white.
      convert_to_png: make a PNG of WebP, TIFF, BMP and GIF files.
    """

    apply_orientation: bool = False
    flatten_alpha: bool = False
    convert_to_png: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Examined:
    """What was found in an image file.

    Attributes:
      problem: why it cannot be used, or None.
      oriented: it has an EXIF orientation other than upright.
      transparent: it has pixels that are not opaque.
      converted: it was made a PNG.
    """

    problem: str | None = None
    oriented: bool = False
    transparent: bool = False
    converted: bool = False


def examine(path: Path, changes: Changes) -> Examined:
    """Opens, changes and decodes an image as it will be."""
    try:
        data = path.read_bytes()
        found = _inspect(data)
        if found.problem is not None or (found.converted and not changes.convert_to_png):
            return dataclasses.replace(found, problem=found.problem or _HINT)
        changed = change(data, changes)
        image_sizes([changed])
        decode(tf.constant(changed))
    except OSError as error:
        return Examined(problem=error.strerror or str(error))
    except DataError as error:
        return Examined(problem=first_line(error.__cause__ or error))
    except tf.errors.InvalidArgumentError as error:
        return Examined(problem=_TF_DECORATION.sub("", first_line(error)).strip())
    return found


_HINT = "neither JPEG nor PNG; --convert_to_png makes a PNG of it"


def _inspect(data: bytes) -> Examined:
    """What a file's own bytes say.

    Raises:
      OSError: it is damaged.
    """
    is_jpeg, is_png = (data.startswith(magic) for magic in _MAGIC)
    if has_16_bits(data):
        return Examined(problem="a PNG of 16 bits per channel; scale it to 8 bits")
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", *_CONVERTIBLE)) as image:
            if not (is_jpeg or is_png):
                if (frames := getattr(image, "n_frames", 1)) > 1:
                    return Examined(problem=f"{image.format} of {frames} frames; expected one image")
                if image.mode not in _MODES:
                    return Examined(
                        problem=f"{image.format} with {image.mode} pixels; expected 8 bits per channel, gray or RGB"
                    )
            return Examined(
                oriented=_orientation(image) != 1,
                transparent=not is_jpeg and _is_transparent(image),
                converted=not (is_jpeg or is_png),
            )
    except (Image.DecompressionBombError, SyntaxError) as error:
        return Examined(problem=first_line(error))
    except Image.UnidentifiedImageError:
        # Of a JPEG or PNG, the decoder's own reason follows.
        return Examined(problem=None if is_jpeg or is_png else "neither JPEG nor PNG")


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 where there is none, or none that can be read."""
    try:
        if image.format == "TIFF":
            image.load()  # which turns it upright already
        found = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # noqa: BLE001  # what a damaged tag raises is not documented; decoders do not read it
        return 1
    return found if found in range(1, 9) else 1


def _is_transparent(image: Image.Image) -> bool:
    if not image.has_transparency_data:
        return False
    return bool(np.asarray(image.convert("RGBA").getchannel("A")).min() < 255)


def change(data: bytes, changes: Changes) -> bytes:
    """An image that can be used, with the changes that it needs; else as it is.

    A JPEG that is turned is encoded again, at quality 95 without chroma subsampling; all else becomes a lossless PNG. An
    ICC profile is kept, all other metadata go.
    """
    if changes == Changes():
        return data
    with Image.open(io.BytesIO(data)) as image:
        # Not by Pillow's format, which is MPO of many a camera's JPEG.
        is_jpeg, profile = data.startswith(_MAGIC[0]), image.info.get("icc_profile")
        turn = changes.apply_orientation and _orientation(image) != 1
        flatten = changes.flatten_alpha and not is_jpeg and _is_transparent(image)
        if not (turn or flatten or image.format in _CONVERTIBLE):
            return data
        pixels = ImageOps.exif_transpose(image) if turn else image.copy()
    if flatten:
        pixels = pixels.convert("RGBA")
        pixels = Image.alpha_composite(Image.new("RGBA", pixels.size, "white"), pixels).convert("RGB")
    elif pixels.mode in ("PA", "RGBX"):  # which a PNG cannot hold
        pixels = pixels.convert("RGBA" if pixels.mode == "PA" else "RGB")
    with io.BytesIO() as file:
        if is_jpeg:
            pixels.save(file, "JPEG", quality=_JPEG_QUALITY, subsampling=0, icc_profile=profile, exif=b"")
        else:
            pixels.save(file, "PNG", icc_profile=profile, exif=b"")
        return file.getvalue()
