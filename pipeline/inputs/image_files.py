"""Examines image files for a data set, and applies the requested changes to them.

TensorFlow's decoders, which render the images for teacher and students, ignore EXIF orientations and drop alpha channels.
Files are kept byte for byte unless a change is requested.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import math
import re
from pathlib import Path

import numpy as np
import tensorflow as tf
from PIL import Image, ImageOps

from pipeline.errors import DataError
from pipeline.errors.causes import first_line
from pipeline.flags.dataset import FOLDER_CHANGES, JPEG_QUALITY
from pipeline.views.headers import has_16_bits, image_sizes
from pipeline.views.render import decode

_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")
_CONVERTIBLE = ("WEBP", "TIFF", "BMP", "GIF")
_MODES = (
    "1",
    "L",
    "LA",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBX",
)  # Pillow's modes of 8 bits per channel, without CMYK
_ORIENTATION = 0x0112  # EXIF tag; 2 to 8 are rotated or mirrored
DAMAGED = (
    SyntaxError,
    ValueError,
    TypeError,
    Image.DecompressionBombError,
)  # raised by Pillow, as OSError is
_TF_DECORATION = re.compile(r"\{\{.*?\}\}|\[Op:\w+\]|, size \d+ +name:")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Changes:
    """Changes of images that need them; none by default.

    Attributes:
      apply_orientation: rotate images as their EXIF orientation says.
      flatten_alpha: put images with transparent pixels onto white.
      convert_to_png: convert WebP, TIFF, BMP and GIF files to PNG.
      short_side: scale images with a longer short side down to this one, in pixels, and store them as JPEG; None for no limit.
      quality: JPEG quality of images that are encoded again.
    """

    apply_orientation: bool = False
    flatten_alpha: bool = False
    convert_to_png: bool = False
    short_side: int | None = None
    quality: int = JPEG_QUALITY

    @property
    def config(self) -> str:
        """Name of the TFDS config of a data set with scaled images; empty without `short_side`."""
        if self.short_side is None:
            return ""
        return f"short_side_{self.short_side}" + (f"_q{self.quality}" if self.quality != JPEG_QUALITY else "")

    def text(self) -> str:
        """The flags that request the changes."""
        words = [f"--{name}" for name in FOLDER_CHANGES if getattr(self, name)]
        if self.short_side is not None:
            words.append(f"--short_side={self.short_side} --quality={self.quality}")
        return " ".join(words)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Examined:
    """Result of examining an image file.

    Attributes:
      problem: why the file cannot be used, or None.
      oriented: whether it has an EXIF orientation other than upright.
      transparent: whether it has pixels that are not opaque.
      converted: whether it has to be converted to PNG.
      content: hash of the file.
    """

    problem: str | None = None
    oriented: bool = False
    transparent: bool = False
    converted: bool = False
    content: bytes = b""


def examine(path: Path, changes: Changes) -> Examined:
    """Opens, changes and decodes an image as the import will, and reports problems. Scaling is left to the import."""
    changes = dataclasses.replace(changes, short_side=None)
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
    except DAMAGED as error:
        return Examined(problem=first_line(error))
    return dataclasses.replace(found, content=hashlib.blake2b(data, digest_size=16).digest())


_HINT = "neither JPEG nor PNG; convert it with `convert_to_png`"


def _inspect(data: bytes) -> Examined:
    """Examines the headers of a file.

    Raises:
      OSError: the file is damaged; other types of errors are in `DAMAGED`.
    """
    is_jpeg, is_png = (data.startswith(magic) for magic in _MAGIC)
    if has_16_bits(data):
        return Examined(problem="PNG of 16 bits per channel; scale it to 8 bits")
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
    except Image.UnidentifiedImageError:
        # For JPEG and PNG, the decoder reports the reason.
        return Examined(problem=None if is_jpeg or is_png else "neither JPEG nor PNG")


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 if it is missing or unreadable."""
    try:
        if image.format == "TIFF":
            image.load()  # rotates it already
        found = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # noqa: BLE001  # Pillow does not document the errors of damaged tags
        return 1
    return found if found in range(1, 9) else 1


def _is_transparent(image: Image.Image) -> bool:
    if not image.has_transparency_data:
        return False
    return bool(np.asarray(image.convert("RGBA").getchannel("A")).min() < 255)


def change(data: bytes, changes: Changes) -> bytes:
    """Applies the changes that an image needs, or returns it as it is.

    A scaled image becomes a JPEG, a rotated JPEG is encoded again without chroma subsampling; other changed images become
    lossless PNGs. The ICC profile is kept, and the EXIF orientation of an image that is scaled but not rotated. Other
    metadata are dropped.

    Raises:
      OSError: the image is damaged; other types of errors are in `DAMAGED`.
    """
    if changes == Changes(quality=changes.quality):
        return data
    with Image.open(io.BytesIO(data)) as image:
        # Pillow's format does not tell: it is MPO for the JPEG files of many cameras.
        is_jpeg, profile = data.startswith(_MAGIC[0]), image.info.get("icc_profile")
        orientation = _orientation(image)
        turn = changes.apply_orientation and orientation != 1
        flatten = changes.flatten_alpha and not is_jpeg and _is_transparent(image)
        convert = changes.convert_to_png and image.format in _CONVERTIBLE
        side = changes.short_side if min(image.size) > (changes.short_side or math.inf) else None
        if not (turn or flatten or convert or side):
            return data
        pixels = ImageOps.exif_transpose(image) if turn else image.copy()
    pixels.info.pop("comment", None)  # which Pillow would write into a JPEG
    if flatten:
        pixels = pixels.convert("RGBA")
        pixels = Image.alpha_composite(Image.new("RGBA", pixels.size, "white"), pixels).convert("RGB")
    if side is not None:
        kept = orientation if not turn else 1
        return _scaled_jpeg(pixels, side, quality=changes.quality, orientation=kept, profile=profile)
    if pixels.mode in ("PA", "RGBX"):  # not supported by PNG
        pixels = pixels.convert("RGBA" if pixels.mode == "PA" else "RGB")
    with io.BytesIO() as file:
        if is_jpeg:
            pixels.save(file, "JPEG", quality=changes.quality, subsampling=0, icc_profile=profile, exif=b"")
        else:
            pixels.save(file, "PNG", icc_profile=profile, exif=b"")
        return file.getvalue()


def _scaled_jpeg(
    pixels: Image.Image, side: int, *, quality: int, orientation: int, profile: bytes | None
) -> bytes:
    """Scales an image to a short side, with antialiasing, and encodes it. An alpha channel is dropped."""
    if pixels.mode == "CMYK":
        profile = None  # of inks
    pixels = pixels.convert("L" if pixels.mode in ("1", "L", "LA") else "RGB")
    factor = side / min(pixels.size)
    width, height = (round(factor * length) for length in pixels.size)
    exif = Image.Exif()
    exif[_ORIENTATION] = orientation
    with io.BytesIO() as file:
        pixels.resize((width, height), Image.Resampling.LANCZOS).save(
            file, "JPEG", quality=quality, icc_profile=profile, exif=exif if orientation != 1 else b""
        )
        return file.getvalue()
