"""pipeline.views.render: the implementation compared to the definition of a crop, with tf.image."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from pipeline.errors import UserError
from pipeline.views.eval_crop import EvalCrop, short_side_shape
from pipeline.views.policies.inception import Inception
from pipeline.views.policies.light import Light
from pipeline.views.render import (
    Renderer,
    Window,
    eval_renderer,
    fingerprint32,
    flip,
    render_probe,
    slice_window,
)
from tests.images import KINDS, encode, photo

SHAPES = [(61, 83), (96, 64), (1, 53), (40, 1), (7, 5)]
BOXES_A_SHAPE = 25


def reference_decode(encoded: bytes) -> np.ndarray:
    """The definition's full decode."""
    if encoded[:2] == b"\xff\xd8":
        return tf.io.decode_jpeg(encoded, channels=3, dct_method="INTEGER_ACCURATE").numpy()
    return tf.io.decode_image(encoded, channels=3, expand_animations=False).numpy()


def reference_resize(
    image: np.ndarray, shape: tuple[int, int], method: str = tf.image.ResizeMethod.BILINEAR
) -> np.ndarray:
    """The definition's resize, round and clip."""
    resized = tf.image.resize(tf.cast(image, tf.float32), shape, method=method, antialias=False).numpy()
    return np.clip(np.rint(resized), 0, 255).astype(np.uint8)


def graph_of(renderer: Renderer) -> tuple[Callable, Callable]:
    """The renderer's fast path, and the path through a whole decoded image, both functions of (encoded, box)."""
    signature = [tf.TensorSpec([], tf.string), tf.TensorSpec([4], tf.int32)]
    fast = tf.function(lambda e, b: renderer.finish(renderer.cut(e, Window.of(b))), input_signature=signature)
    whole = tf.function(
        lambda e, b: renderer.finish(slice_window(renderer.prepare(e), Window.of(b))),
        input_signature=signature,
    )
    return fast, whole


def random_boxes(height: int, width: int, count: int, generator: np.random.Generator) -> np.ndarray:
    """Boxes of any size in an image: int32 [count + 1, 4]; the last one is the whole image."""
    boxes = [[0, 0, height, width]]
    for _ in range(count):
        h, w = generator.integers(1, height + 1), generator.integers(1, width + 1)
        boxes.insert(0, [generator.integers(height - h + 1), generator.integers(width - w + 1), h, w])
    return np.array(boxes, np.int32)


@pytest.mark.parametrize("kind", KINDS)
def test_inception_crop_is_the_definition_on_both_paths(kind: str) -> None:
    """Odd sizes, a pixel high and a pixel wide; alpha is dropped and CMYK converted as TensorFlow does."""
    fast, whole = graph_of(Inception(image_size=24).renderer())
    generator = np.random.default_rng(0)
    for number, (height, width) in enumerate(SHAPES):
        encoded = encode(photo(height, width, seed=number), kind)
        image = reference_decode(encoded)
        assert image.shape == (height, width, 3)
        for box in random_boxes(height, width, BOXES_A_SHAPE, generator):
            y, x, h, w = box
            expected = reference_resize(image[y : y + h, x : x + w], (24, 24))
            arguments = tf.constant(encoded), tf.constant(box)
            np.testing.assert_array_equal(fast(*arguments).numpy(), expected, err_msg=f"fast, {box}")
            np.testing.assert_array_equal(whole(*arguments).numpy(), expected, err_msg=f"whole, {box}")


def test_decode_and_crop_without_a_margin_is_not_the_definition() -> None:
    """Why the margin is there, and proof that the test above can fail."""
    encoded = encode(photo(61, 83, seed=0), "jpeg_420")
    image, differ = reference_decode(encoded), 0
    for box in random_boxes(61, 83, 50, np.random.default_rng(0)):
        y, x, h, w = box
        bare = tf.io.decode_and_crop_jpeg(encoded, box, channels=3, dct_method="INTEGER_ACCURATE").numpy()
        differ += (bare != image[y : y + h, x : x + w]).any()
    assert differ > 10


def test_conversions_keep_the_picture() -> None:
    """CMYK and alpha are converted, not garbled: near the RGB rendering of the same pixels."""
    pixels = photo(60, 80, seed=3)
    for kind, tolerance in (("png_rgba", 0), ("jpeg_cmyk", 12)):
        converted = reference_decode(encode(pixels, kind)).astype(int)
        assert np.abs(converted - pixels).mean() <= tolerance, kind
    grey = reference_decode(encode(pixels, "png_grey"))
    assert (grey[..., :1] == grey).all()


@pytest.mark.parametrize("kind", ["jpeg_420", "jpeg_grey", "png_rgb"])
def test_light_crop_is_the_definition(kind: str) -> None:
    policy = Light(image_size=24)  # canvas 30
    fast, whole = graph_of(policy.renderer())
    for number, (height, width) in enumerate([*SHAPES, (30, 30)]):
        encoded = encode(photo(height, width, seed=number), kind)
        canvas = reference_resize(reference_decode(encoded), (30, 30))
        for y, x in [(0, 0), (6, 6), (2, 5)]:
            expected = canvas[y : y + 24, x : x + 24]
            box = tf.constant([y, x, 24, 24])
            np.testing.assert_array_equal(fast(tf.constant(encoded), box).numpy(), expected)
            np.testing.assert_array_equal(whole(tf.constant(encoded), box).numpy(), expected)


@pytest.mark.parametrize("kind", ["jpeg_420", "jpeg_progressive", "png_grey"])
def test_resize_small_evaluation_crop_is_the_definition(kind: str) -> None:
    """Short side to 1.25 * S by area, then the central S x S (big_vision's `resize_small`, `central_crop`)."""
    crop = EvalCrop(kind="resize_small", scale=1.25)
    fast, _ = graph_of(eval_renderer(crop, 24))
    for number, (height, width) in enumerate([(61, 83), (96, 64), (45, 45), (30, 31), (20, 200)]):
        encoded = encode(photo(height, width, seed=number), kind)
        shortest = min(height, width)
        shape = tuple(math.floor(Fraction(side * 30, shortest) + Fraction(1, 2)) for side in (height, width))
        resized = reference_resize(reference_decode(encoded), shape, tf.image.ResizeMethod.AREA)
        y, x = (shape[0] - 24) // 2, (shape[1] - 24) // 2
        box = crop.boxes(np.array([[height, width]]), 24)[0]
        assert box.tolist() == [y, x, 24, 24]
        np.testing.assert_array_equal(
            fast(tf.constant(encoded), tf.constant(box)).numpy(), resized[y : y + 24, x : x + 24]
        )


@pytest.mark.parametrize("kind", ["jpeg_420", "png_rgb"])
def test_central_evaluation_crop_is_the_definition(kind: str) -> None:
    """Central 87.5 % of both sides, resized (the Keras example's)."""
    crop = EvalCrop(kind="central", scale=0.875)
    fast, _ = graph_of(eval_renderer(crop, 24))
    for number, (height, width) in enumerate([(61, 83), (96, 64), (1, 53)]):
        encoded = encode(photo(height, width, seed=number), kind)
        h, w = (max(round(side * 0.875), 1) for side in (height, width))
        y, x = (height - h) // 2, (width - w) // 2
        box = crop.boxes(np.array([[height, width]]), 24)[0]
        assert box.tolist() == [y, x, h, w]
        expected = reference_resize(reference_decode(encoded)[y : y + h, x : x + w], (24, 24))
        np.testing.assert_array_equal(fast(tf.constant(encoded), tf.constant(box)).numpy(), expected)


def test_evaluation_boxes_lie_inside_every_small_image() -> None:
    sizes = np.stack(np.meshgrid(np.arange(1, 41), np.arange(1, 41)), -1).reshape(-1, 2)
    for crop in (EvalCrop(), EvalCrop(scale=1.0), EvalCrop(kind="central", scale=0.875)):
        boxes = crop.boxes(sizes, 24)
        room = sizes if crop.kind == "central" else short_side_shape(sizes, round(crop.scale * 24))
        assert (boxes[:, :2] >= 0).all()
        assert (boxes[:, 2:] >= 1).all()
        assert (boxes[:, :2] + boxes[:, 2:] <= room).all()


@pytest.mark.parametrize(
    "fields", [{"kind": "corner"}, {"scale": 0.9}, {"kind": "central", "scale": 1.5}, {"scale": float("nan")}]
)
def test_an_impossible_evaluation_crop_is_refused(fields: dict) -> None:
    with pytest.raises(UserError, match=r"resize_small.*central"):
        EvalCrop(**fields)


@pytest.mark.parametrize("flipped", [False, True])
def test_flip_mirrors_left_to_right(flipped: bool) -> None:
    crop = photo(24, 24, seed=0)
    expected = crop[:, ::-1] if flipped else crop
    np.testing.assert_array_equal(
        flip(tf.constant(crop), Window.of([0, 0, 24, 24], flipped=flipped)).numpy(), expected
    )


def test_fingerprints_are_the_low_half_of_farmhash() -> None:
    data = tf.constant([b"", b"abc", b"a longer text than thirty-two bytes, for FarmHash's other branch"])
    whole = tf.fingerprint(data).numpy()
    expected = [int.from_bytes(row[:4].tobytes(), "little") for row in whole]
    assert fingerprint32(data).numpy().tolist() == expected


def test_golden_hashes() -> None:
    """May change only with pipeline.store.spec.FORMAT_VERSION: of source bytes, and of a constant crop."""
    assert fingerprint32(tf.constant([b"", b"abc"])).numpy().tolist() == [797982799, 1961358185]
    # A constant image renders to itself on any machine.
    renderer = Inception(image_size=8).renderer()
    encoded = tf.io.encode_png(tf.fill([13, 11, 3], tf.constant(100, tf.uint8)))
    crop = renderer.finish(renderer.cut(encoded, Window.of([2, 1, 9, 7])))
    assert (crop.numpy() == 100).all()
    assert fingerprint32(tf.reshape(crop, [1, -1])).numpy().tolist() == [811653678]


def test_render_probe_is_repeatable() -> None:
    """Its value may differ by processor family or TensorFlow, so none is written down here."""
    probe = render_probe()
    assert len(bytes.fromhex(probe)) == 8
    assert render_probe() == probe


def test_render_probe_is_the_one_in_a_stored_spec(published_store: Path) -> None:
    assert (
        json.loads((published_store / "spec.json").read_text())["identity"]["render_probe"] == render_probe()
    )
