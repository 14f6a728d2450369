"""The only renderer: encoded image and parameters to `uint8` crop, the same for teacher and student.

A crop is *defined* as full decode (`dct_method='INTEGER_ACCURATE'`), slice, bilinear resize to `S x S` without antialias, round,
clip, flip. `light` and the evaluation crop resize first and slice second. The implementation is faster and bit-identical: of a JPEG,
only the box and a margin are decoded, and nothing is cast to float before the resize. A test compares the two paths.

TensorFlow's decoders expand grayscale images to three channels, drop alpha channels and convert CMYK. Only the first frame of an
animation is used.
"""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import tensorflow as tf

from pipeline.views.eval_crop import EvalCrop, short_side_shape

# Chroma upsampling uses neighbors outside the box: decode-and-crop of the bare box differed from decode-then-slice for 426 of 900
# boxes, by up to 23 levels. With 2 more pixels per side, it differed for none of 720.
MARGIN = 2


def decode(encoded: tf.Tensor) -> tf.Tensor:
    """Encoded image, string [], to uint8 [H, W, 3]."""
    image = tf.cond(
        tf.io.is_jpeg(encoded),
        lambda: tf.io.decode_jpeg(encoded, channels=3, dct_method="INTEGER_ACCURATE"),
        lambda: tf.io.decode_image(encoded, channels=3, expand_animations=False),
    )
    return tf.ensure_shape(image, [None, None, 3])


class Window(NamedTuple):
    """A box in the form that the decoding ops need.

    Attributes:
      low: int32 [2], top left corner (y, x) of the box with its margin, inside the image.
      high: int32 [2], bottom right corner with its margin, possibly outside the image.
      inside: int32 [3], offset of the box (y, x, channel) from `low`.
      begin: int32 [3], offset of the box in the image.
      size: int32 [3], height, width and channels of the box.
      mirrored: int32 [3], 1 for the axis along which the crop is flipped.
    """

    low: tf.Tensor
    high: tf.Tensor
    inside: tf.Tensor
    begin: tf.Tensor
    size: tf.Tensor
    mirrored: tf.Tensor

    @classmethod
    def unpack(cls, row: tf.Tensor) -> Window:
        """Converts one row of `pack_windows`, with one op."""
        return cls(*tf.split(row, [2, 2, 3, 3, 3, 3]))

    @classmethod
    def of(cls, box: Any, *, flipped: bool = False) -> Window:
        """The window of one box int32 [4] (y, x, height, width)."""
        return cls.unpack(
            pack_windows(tf.convert_to_tensor(box, tf.int32)[tf.newaxis], tf.constant([flipped]))[0]
        )


def pack_windows(box: tf.Tensor, flipped: tf.Tensor) -> tf.Tensor:
    """Boxes int32 [n, 4] and flips bool [n] to rows int32 [n, 16], one `Window` per row.

    Computed for a whole batch: arithmetic on four numbers per image costs as much as a small resize, and so does each tensor that a
    loop over images passes along.
    """
    corner, extent = box[:, :2], box[:, 2:]
    low = tf.maximum(corner - MARGIN, 0)
    channel = [[0, 0], [0, 1]]
    parts = [
        low,
        corner + extent + MARGIN,
        tf.pad(corner - low, channel),
        tf.pad(corner, channel),
        tf.pad(extent, channel, constant_values=3),
        tf.pad(tf.cast(flipped, tf.int32)[:, tf.newaxis], [[0, 0], [1, 1]]),
    ]
    return tf.concat(parts, axis=1)


def slice_window(image: tf.Tensor, window: Window) -> tf.Tensor:
    """Slices the box of a window: uint8 [H, W, 3] to uint8 [height, width, 3]."""
    return tf.ensure_shape(tf.slice(image, window.begin, window.size), [None, None, 3])


def decode_window(encoded: tf.Tensor, window: Window, *, jpeg: bool) -> tf.Tensor:
    """Decodes the box of a window, of a JPEG without the rest; bit-identical to a slice of the whole decoded image.

    Args:
      encoded: encoded image, string [].
      window: the box.
      jpeg: whether the image is known to be a JPEG; otherwise its content is checked.

    Returns:
      uint8 [height, width, 3].
    """

    def from_jpeg() -> tf.Tensor:
        # Written to run few ops: each costs several microseconds, a whole box several hundred.
        shape = tf.io.extract_jpeg_shape(encoded)[:2]
        crop = tf.concat([window.low, tf.minimum(window.high, shape) - window.low], 0)
        around = tf.io.decode_and_crop_jpeg(encoded, crop, channels=3, dct_method="INTEGER_ACCURATE")
        return tf.slice(around, window.inside, window.size)

    def from_any() -> tf.Tensor:
        return slice_window(decode(encoded), window)

    region = from_jpeg() if jpeg else tf.cond(tf.io.is_jpeg(encoded), from_jpeg, from_any)
    return tf.ensure_shape(region, [None, None, 3])


def _to_uint8(image: tf.Tensor) -> tf.Tensor:
    """Rounds half to even. Weighted means of 0..255 stay in this range, up to errors that the rounding removes."""
    return tf.cast(tf.round(image), tf.uint8)


def resize_bilinear(image: tf.Tensor, size: int) -> tf.Tensor:
    """`tf.image.resize(image, [size, size])`, rounded: uint8 [h, w, 3] to uint8 [size, size, 3].

    The kernel is called directly because the wrapper's shape arithmetic costs as much as a small resize.
    """
    out = tf.raw_ops.ResizeBilinear(images=image[tf.newaxis], size=[size, size], half_pixel_centers=True)
    return _to_uint8(tf.reshape(out, [size, size, 3]))


def resize_short_side(image: tf.Tensor, size: int) -> tf.Tensor:
    """Short side to `size` pixels by area: uint8 [h, w, 3] to uint8 [h', w', 3]."""
    shape = tf.shape(image)[:2]
    shortest = tf.reduce_min(shape)
    # Integer arithmetic, so that NumPy and TensorFlow agree on the size; see `short_side_shape`.
    target = (2 * shape * size + shortest) // (2 * shortest)
    return _to_uint8(tf.raw_ops.ResizeArea(images=image[tf.newaxis], size=target)[0])


def flip(crop: tf.Tensor, window: Window) -> tf.Tensor:
    """Flips uint8 [S, S, 3] horizontally if the window is mirrored."""
    return tf.raw_ops.Reverse(tensor=crop, dims=tf.cast(window.mirrored, tf.bool))


class Renderer(Protocol):
    """Renders crops in three steps. The image after the first step may be cached.

    `finish(slice_window(prepare(encoded), window))` and `finish(cut(encoded, window))` are bit-identical.
    """

    @property
    def image_size(self) -> int:
        """S, side of a crop in pixels."""

    def prepare(self, encoded: tf.Tensor) -> tf.Tensor:
        """Encoded image to the image that boxes refer to, uint8 [H, W, 3]."""

    def prepared_shapes(self, sizes: np.ndarray) -> np.ndarray:
        """Height and width after `prepare`, for images of sizes int [n, 2]: int [n, 2]."""

    def cut(self, encoded: tf.Tensor, window: Window, *, jpeg: bool = False) -> tf.Tensor:
        """Encoded image to the uint8 region of a window, without `prepare`. `jpeg`: whether it is known to be a JPEG."""

    def finish(self, region: tf.Tensor) -> tf.Tensor:
        """Region to crop, uint8 [S, S, 3], before the flip."""


@dataclasses.dataclass(frozen=True)
class BoxRenderer:
    """Slices a box of the source, then resizes it, as for `inception` and the Keras example's evaluation."""

    image_size: int

    def prepare(self, encoded: tf.Tensor) -> tf.Tensor:
        return decode(encoded)

    def prepared_shapes(self, sizes: np.ndarray) -> np.ndarray:
        return sizes

    def cut(self, encoded: tf.Tensor, window: Window, *, jpeg: bool = False) -> tf.Tensor:
        return decode_window(encoded, window, jpeg=jpeg)

    def finish(self, region: tf.Tensor) -> tf.Tensor:
        return resize_bilinear(region, self.image_size)


@dataclasses.dataclass(frozen=True)
class WindowRenderer:
    """Resizes the source, then slices a window of the crop's size, as for `light` and the paper's evaluation."""

    image_size: int
    resize: Callable[[tf.Tensor], tf.Tensor]
    resized_shapes: Callable[[np.ndarray], np.ndarray]

    def prepare(self, encoded: tf.Tensor) -> tf.Tensor:
        return self.resize(decode(encoded))

    def prepared_shapes(self, sizes: np.ndarray) -> np.ndarray:
        return self.resized_shapes(sizes)

    def cut(self, encoded: tf.Tensor, window: Window, *, jpeg: bool = False) -> tf.Tensor:
        del jpeg  # the whole image is decoded in any case
        return slice_window(self.prepare(encoded), window)

    def finish(self, region: tf.Tensor) -> tf.Tensor:
        return tf.ensure_shape(region, [self.image_size, self.image_size, 3])


def eval_renderer(crop: EvalCrop, image_size: int) -> Renderer:
    """The renderer of evaluation crops with side `image_size`."""
    if crop.kind == "central":
        return BoxRenderer(image_size)
    short = round(crop.scale * image_size)
    return WindowRenderer(
        image_size,
        lambda image: resize_short_side(image, short),
        lambda sizes: short_side_shape(sizes, short),
    )


def fingerprint32(data: tf.Tensor) -> tf.Tensor:
    """Lower half of the 64-bit FarmHash: uint8 [K, ...] or string [K] to int64 [K] in 0..2**32-1."""
    words = tf.bitcast(tf.reshape(tf.fingerprint(data), [-1, 2, 4]), tf.uint32)
    return tf.cast(words[:, 0], tf.int64)


# A synthetic 48 x 40 color image as 4:2:0 JPEG. Stored encoded, since other versions of libjpeg may encode it differently.
_PROBE = base64.b85decode(
    "|JeWF01!$>Nk#wx0RR9200961|JwjV01XKW3knDg3knMk4h;_zAQcl55)&sJ9v2`kDKRiEDJ?8BI!Zn>HbyrrEkIX6ModmpQ"
    "&KWMT47pHU`kO^PygEhLjevB4iga*CKVMXPc<zyPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPf"
    "t%zPf!2A01*fPFaRh60U`hb5di}c0sq7R8vp?S0{{a70000000000000C41qJ~F2Lk`Z04Wdv0R#a90|WsD000000000100I"
    "L95d|S(5;0K*B0+JX6eF?G@c+aB836$R0s{a50000000000000F60s{mF|HJ?#5dZ-L0|NvD0RR9100000009630|XHgAu&+"
    "}6C%MuVS%Cl+5ij#0RRFK0}%i}0K-95tidBL{u0>|?_@kA#|H_jiq=3dk3g#f&&ueI9une%gotbKods?YN2?p|nTA^;Hj8BL"
    "Fnom->=l3=PQU|lPr{1kXeaY~Zhw6(@meDmF0#%?UxdhOaF-2U6X2=B6R1=hmC3`RBo%m8RqA%xE-I~K3*JLo(U&-!06eNaU"
    ")EZFp5tFmVYy&CrOs*TV>{=3ZhnS2_(H^Ho%qHskZa3Zl6Cwzewrc(&+cvbQDL2`YPSyd3@ykZu=_E$p8o)q7g<e5BO?PKfv"
    "BUXs(F$}0C?apLxP`em(}}qG@8zmcQnWwmc$$bozDYfy5n5eY3Ou;z>?&Eh@s?TcOQT<KG&Stp601$Nv%ld86A>8-(S`iCUm"
    "n}JJ;~%l(apzYW;qPz6bRuT=fmjUPByC=&lZ0&@t2X<m2S|IKmA|9kx~#H2&Vzc~4F4?OQFTYy$=h1rp5pPP+|&*ed#ZcW-K"
    "oTULWu0dV?JL#p9~;`e}7F>|v2*#"
)


def render_probe() -> str:
    """Fingerprint of the built-in test image as rendered on this machine, enlarged, reduced and by area: 16 hex digits.

    Bilinear resize uses float arithmetic, so other processor families or TensorFlow versions may round differently. The spec
    contains the value of the machine that wrote the store.
    """
    picture = tf.constant(_PROBE)
    parts = [
        resize_bilinear(decode_window(picture, Window.of([3, 5, 31, 29]), jpeg=True), 64),
        resize_bilinear(decode(picture), 17),
        resize_short_side(decode(picture), 23),
    ]
    joined = tf.concat([tf.reshape(part, [-1]) for part in parts], 0)
    return bytes(tf.fingerprint(joined[tf.newaxis]).numpy()[0]).hex()
