"""pipeline.inputs.image_files: what is found in image files, and the changes that are offered."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageOps

from pipeline.inputs.image_files import Changes, change, examine
from pipeline.views.render import decode
from tests.images import KINDS, encode, photo

PIXELS = photo(20, 30, seed=3)
ALL = Changes(apply_orientation=True, flatten_alpha=True, convert_to_png=True)


def save(image: Image.Image, file_format: str, **options: object) -> bytes:
    with io.BytesIO() as file:
        image.save(file, file_format, **options)
        return file.getvalue()


def oriented(file_format: str, orientation: int, **options: object) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return save(Image.fromarray(PIXELS), file_format, exif=exif, **options)


def pixels(data: bytes) -> np.ndarray:
    return decode(tf.constant(data)).numpy()


def examined(tmp_path: Path, data: bytes, changes: Changes = ALL) -> object:
    path = tmp_path / "image"
    path.write_bytes(data)
    return examine(path, changes)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_orientation_is_found_and_applied(tmp_path: Path, file_format: str, orientation: int) -> None:
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(file_format, {})
    data = oriented(file_format, orientation, **options)
    assert examined(tmp_path, data).oriented == (orientation != 1)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    changed = change(data, ALL)
    got = pixels(changed).astype(int)
    assert got.shape == expected.shape
    assert np.abs(got - expected).mean() < (5 if file_format == "JPEG" else 1e-9)
    assert not examined(tmp_path, changed).oriented
    if file_format != "WEBP":
        assert change(data, Changes()) == data
        assert (change(data, ALL) == data) == (orientation == 1)


def test_a_jpeg_of_two_pictures_stays_a_jpeg(tmp_path: Path) -> None:
    image = Image.fromarray(PIXELS)
    exif = Image.Exif()
    exif[0x0112] = 6
    data = save(image, "MPO", save_all=True, append_images=[image], exif=exif)
    assert examined(tmp_path, data).oriented
    assert change(data, ALL).startswith(b"\xff\xd8\xff")
    assert pixels(change(data, ALL)).shape == (30, 20, 3)


def test_a_damaged_tag_is_no_orientation(tmp_path: Path) -> None:
    data = oriented("JPEG", 6)
    damaged = data.replace(b"Exif\x00\x00MM", b"Exif\x00\x00XX").replace(b"Exif\x00\x00II", b"Exif\x00\x00XX")
    assert damaged != data
    found = examined(tmp_path, damaged)
    assert (found.problem, found.oriented) == (None, False)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_found_and_put_onto_white(tmp_path: Path, mode: str) -> None:
    """A drawing whose content is in the alpha channel: black everywhere, opaque in one corner."""
    rgba = np.zeros([16, 16, 4], np.uint8)
    rgba[:8, :8, 3] = 255
    data = save(Image.fromarray(rgba).convert(mode), "PNG")
    assert examined(tmp_path, data).transparent
    assert (pixels(data) == 0).all()  # what the decoder sees
    flattened = pixels(change(data, Changes(flatten_alpha=True)))
    assert (flattened[:8, :8] == 0).all()
    assert (flattened[8:] == 255).all()
    assert change(data, Changes(apply_orientation=True)) == data


def test_an_opaque_alpha_channel_is_nothing_to_tell(tmp_path: Path) -> None:
    data = save(Image.fromarray(PIXELS).convert("RGBA"), "PNG")
    assert not examined(tmp_path, data).transparent
    assert change(data, ALL) == data


@pytest.mark.parametrize(
    ("file_format", "mode", "options"),
    [
        ("WEBP", "RGB", {"lossless": True}),
        ("WEBP", "RGB", {"quality": 80}),
        ("WEBP", "RGBA", {"lossless": True, "exact": True}),
        ("TIFF", "RGB", {"compression": "tiff_lzw"}),
        ("TIFF", "L", {}),
        ("TIFF", "1", {}),
        ("BMP", "RGB", {}),
        ("BMP", "P", {}),
        ("GIF", "P", {}),
    ],
)
def test_other_formats_become_a_lossless_png(
    tmp_path: Path, file_format: str, mode: str, options: dict[str, object]
) -> None:
    data = save(Image.fromarray(PIXELS).convert(mode), file_format, **options)
    refused = examined(tmp_path, data, Changes())
    assert "`convert_to_png`" in refused.problem
    found = examined(tmp_path, data, Changes(convert_to_png=True))
    assert (found.problem, found.converted) == (None, True)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(image.convert("RGBA").convert("RGB") if mode == "P" else image.convert("RGB"))
    changed = change(data, Changes(convert_to_png=True))
    assert changed.startswith(b"\x89PNG")
    np.testing.assert_array_equal(pixels(changed), expected)


def test_a_tiff_is_turned_once(tmp_path: Path) -> None:
    data = oriented("TIFF", 6)
    assert pixels(change(data, ALL)).shape == (30, 20, 3)


def test_an_icc_profile_is_kept(tmp_path: Path) -> None:
    data = save(Image.fromarray(PIXELS), "WEBP", icc_profile=b"a profile")
    with Image.open(io.BytesIO(change(data, ALL))) as image:
        assert image.info["icc_profile"] == b"a profile"


def frames(file_format: str) -> bytes:
    image = Image.fromarray(PIXELS)
    return save(image, file_format, save_all=True, append_images=[image.rotate(180)])


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: frames("WEBP"), "2 frames"),
        (lambda: frames("TIFF"), "2 frames"),
        (lambda: frames("GIF"), "2 frames"),
        (lambda: save(Image.fromarray(PIXELS).convert("CMYK"), "TIFF"), "CMYK"),
        (lambda: save(Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 16), "TIFF"), "I;16"),
        (lambda: save(Image.fromarray(PIXELS[..., 0].astype(np.float32)), "TIFF"), "F"),
        (lambda: encode(PIXELS, "png_16"), "16 bits"),
        (lambda: save(Image.fromarray(PIXELS), "PPM"), "neither JPEG nor PNG"),
        (lambda: save(Image.fromarray(PIXELS), "TIFF")[:200], ""),
        (lambda: save(Image.fromarray(PIXELS), "WEBP")[:-100], ""),
        (lambda: save(Image.fromarray(PIXELS).convert("RGBA"), "PNG")[:-100], ""),
        (lambda: b"", "neither JPEG nor PNG"),
    ],
    ids=[
        "webp_frames",
        "tiff_frames",
        "gif_frames",
        "cmyk",
        "16_bit_tiff",
        "float_tiff",
        "16_bit_png",
        "ppm",
        "cut_tiff",
        "cut_webp",
        "cut_png",
        "empty",
    ],
)
def test_what_cannot_be_used_says_why(tmp_path: Path, make, named: str) -> None:
    problem = examined(tmp_path, make()).problem
    assert problem is not None
    assert named in problem
    assert "\n" not in problem


@pytest.mark.filterwarnings("ignore")  # of Pillow, about damaged metadata
def test_any_damage_is_a_problem_and_no_traceback(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    seeds = [save(Image.fromarray(PIXELS), name) for name in ("PNG", "BMP", "GIF", "WEBP")]
    seeds += [oriented("TIFF", 6), oriented("PNG", 6), encode(PIXELS, "png_long_text")]
    problems = 0
    for data in seeds:
        for _ in range(60):
            damaged = np.frombuffer(data, np.uint8).copy()
            damaged[rng.integers(0, min(len(data), 120), 2)] = rng.integers(0, 256, 2)
            problems += examined(tmp_path, damaged.tobytes()).problem is not None
    assert problems > 50


def test_a_png_with_text_longer_than_pillow_accepts_is_a_problem(tmp_path: Path) -> None:
    assert examined(tmp_path, encode(PIXELS, "png_long_text")).problem


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind not in ("png_16", "gif", "bmp", "png_long_text")]
)
def test_a_scaled_image_is_the_smaller_picture(kind: str) -> None:
    data = encode(photo(60, 90, seed=1), kind)
    small = change(data, Changes(short_side=20))
    assert small.startswith(b"\xff\xd8\xff")
    expected = tf.image.resize(pixels(data), [20, 30], method="lanczos3", antialias=True).numpy()
    got = pixels(small).astype(float)
    assert got.shape == expected.shape
    assert np.abs(got - expected).mean() < 8
    for limit in (60, 100):
        assert change(data, Changes(short_side=limit)) == data


def test_an_orientation_that_is_kept_is_kept_in_the_scaled_image(tmp_path: Path) -> None:
    data = oriented("JPEG", 6)  # 20 x 30 pixels, stored
    kept = change(data, Changes(short_side=10))
    assert pixels(kept).shape == (10, 15, 3)
    assert examined(tmp_path, kept).oriented
    turned = change(data, Changes(short_side=10, apply_orientation=True))
    assert pixels(turned).shape == (15, 10, 3)
    assert not examined(tmp_path, turned).oriented


def test_quality_sets_the_size_and_only_the_picture_is_kept() -> None:
    picture = Image.fromarray(photo(60, 90, seed=1))
    data = save(picture, "JPEG", quality=95, icc_profile=b"profile", comment=b"taken at home")
    sizes = [len(change(data, Changes(short_side=40, quality=quality))) for quality in (50, 80, 95)]
    assert sizes == sorted(sizes)
    small = change(data, Changes(short_side=40))
    assert b"taken at home" not in small
    with Image.open(io.BytesIO(small)) as image:
        assert image.info["icc_profile"] == b"profile"
        assert "exif" not in image.info


def test_a_scaled_gray_image_stays_gray() -> None:
    with Image.open(io.BytesIO(change(encode(PIXELS, "png_grey"), Changes(short_side=9)))) as image:
        assert image.mode == "L"


def test_the_config_of_scaled_images_names_size_and_quality() -> None:
    configs = [Changes(), Changes(short_side=160), Changes(short_side=160, quality=80)]
    assert [changes.config for changes in configs] == ["", "short_side_160", "short_side_160_q80"]
