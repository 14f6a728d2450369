"""Loads a teacher, fingerprints it, and turns views into logits.

A SavedModel is code: load only what you trust. `.keras` files run no code of their own; see `pipeline.inputs.keras_file`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tensorflow as tf

from pipeline.cli.choices import DEFAULT_SIGNATURE, VALUE_RANGES, check_num_classes, check_value_range
from pipeline.errors import DataError, UserError
from pipeline.errors.causes import first_line
from pipeline.inputs.device_memory import naming_memory
from pipeline.inputs.keras_file import load_keras_file
from pipeline.inputs.teacher_checks import check_rows, tolerance_of
from pipeline.storage.bucket import is_url
from pipeline.storage.copies import copied_teacher
from pipeline.store.identity import TeacherIdentity
from pipeline.views.mix import mix

_BLOCK = 1 << 20


def fingerprint(path: str | Path) -> str:
    """SHA-256 over the sorted relative file names and contents of a SavedModel or file, 64 hex digits."""
    root = Path(path)
    files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
    digest = hashlib.sha256()
    for file in files:
        name = file.name if root.is_file() else file.relative_to(root).as_posix()
        digest.update(f"{len(name)} {name} {file.stat().st_size}\n".encode())
        with file.open("rb") as content:
            while block := content.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()


def local_teacher(path: str | Path) -> Path:
    """Where a teacher is on this machine; one in a bucket is copied.

    Raises:
      UserError: there is none.
    """
    place = copied_teacher(str(path)) if is_url(path) else Path(path)
    if not place.exists():
        raise UserError(
            f"--teacher={path}: no such file or directory; expected a SavedModel or a .keras file"
        )
    return place


class Teacher:
    """A classifier: views float32 [B, S, S, 3] in 0..255 to logits float32 [B, C].

    Attributes:
      path: of the SavedModel directory or `.keras` file; for a URL, of its copy on this machine.
      signature: of the SavedModel that is called.
      value_range: that the model wants its input in; one of `VALUE_RANGES`.

    Args:
      image_size: S in pixels.
      num_classes: C, 2 or more.
      batch_size: B, if it is known; a model of another fixed batch is refused.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        image_size: int,
        num_classes: int,
        value_range: str = "0..255",
        signature: str = DEFAULT_SIGNATURE,
        batch_size: int | None = None,
    ) -> None:
        check_value_range(value_range)
        check_num_classes(num_classes, of=f"--teacher={path}")
        self.path = local_teacher(path)
        self.signature = signature
        self.value_range = value_range
        self._image_size = image_size
        self._num_classes = num_classes
        self._batch_size = batch_size
        self._scale, self._shift = VALUE_RANGES[value_range]
        if self.path.is_file():
            self._load_keras()
        else:
            self._load_saved_model()
        self._logits = tf.function(
            lambda crops, partner, ratio: self(mix(crops, partner, ratio)), reduce_retracing=False
        )
        self._in_range = tf.function(
            lambda crops, scale, shift: self._outputs(tf.cast(crops, tf.float32) * scale + shift)
        )

    def _load_keras(self) -> None:
        self._model = load_keras_file(self.path, flag="--teacher")
        inputs, outputs = (getattr(self._model, name, None) or () for name in ("inputs", "outputs"))
        if not inputs:
            size = self._image_size
            raise UserError(
                f"--teacher={self.path}: {self._model.name}, a {type(self._model).__name__}, was saved before it was built, so "
                f"it has no weights; call it on images or `model.build((None, {size}, {size}, 3))`, train it, and save it again"
            )
        if len(inputs) != 1 or len(outputs) != 1:
            raise UserError(
                f"--teacher={self.path}: has {len(inputs)} inputs and {len(outputs)} outputs; expected one of each"
            )
        self.signature = "keras"
        self._dtype = tf.as_dtype(self._model.inputs[0].dtype)
        self._check_input(self._model.inputs[0].shape)
        self._variables = self._model.variables
        self._call = lambda images: self._model(images, training=False)

    def _load_saved_model(self) -> None:
        if not (self.path / "saved_model.pb").is_file():
            raise UserError(f"--teacher={self.path}: no saved_model.pb there; expected a SavedModel")
        try:
            self._model = tf.saved_model.load(str(self.path))
        except (ValueError, OSError, KeyError, tf.errors.OpError) as error:
            raise UserError(
                f"--teacher={self.path}: TensorFlow cannot load it: {first_line(error)}"
            ) from error
        signatures = self._model.signatures
        if self.signature not in signatures:
            raise UserError(
                f"--teacher_signature={self.signature}: {self.path} has signatures {', '.join(signatures) or 'none'}"
            )
        function = signatures[self.signature]
        inputs = function.structured_input_signature[1]
        if len(inputs) != 1:
            raise UserError(
                f"--teacher={self.path}: signature {self.signature} takes {', '.join(inputs) or 'nothing'}; expected "
                "one image input"
            )
        (name, spec), outputs = next(iter(inputs.items())), function.structured_outputs
        output = "logits" if "logits" in outputs else next(iter(outputs))
        if len(outputs) != 1 and output != "logits":
            raise UserError(
                f"--teacher={self.path}: signature {self.signature} gives {', '.join(outputs)}; expected one output, or "
                "one named `logits`"
            )
        self._dtype = spec.dtype
        self._check_input(spec.shape)
        self._variables = function.variables
        self._call = lambda images: function(**{name: images})[output]

    def _check_input(self, shape: tf.TensorShape) -> None:
        size = self._image_size
        takes = f"--teacher={self.path}: takes {self._dtype.name} {shape}"
        if not self._dtype.is_floating:
            raise UserError(
                f"{takes}, but views are float32 [B, {size}, {size}, 3] in 0..255: mixed views are not whole numbers; "
                "export it with a float32 input, cast inside if need be"
            )
        if shape.rank == 4 and shape[1] == 3 != size and shape[3] != 3:
            raise UserError(
                f"{takes}, channels first, but views are float32 [B, {size}, {size}, 3]; export it with a transpose in "
                "front: tf.transpose(image, [0, 3, 1, 2])"
            )
        if not shape.is_compatible_with(tf.TensorShape([None, size, size, 3])):
            remedy = "export it for such views"
            if shape.rank == 4 and shape[3] == 1:
                remedy = "export it with tf.image.rgb_to_grayscale in front"
            elif shape.rank == 4 and shape[3] == 3 and shape[1] == shape[2] is not None:
                remedy = f"choose --image_size={shape[1]} to match"
            raise UserError(f"{takes}, but views are float32 [B, {size}, {size}, 3]; {remedy}")
        fixed = shape[0] if shape.rank else None
        if fixed is not None and self._batch_size is not None and fixed != self._batch_size:
            raise UserError(
                f"{takes}: a batch of exactly {fixed}, but --teacher_batch_size={self._batch_size}; pass "
                f"--teacher_batch_size={fixed}, or export it with a batch dimension of None"
            )

    @property
    def num_parameters(self) -> int | None:
        """Numbers in the variables that it is made of; None where they were frozen into constants."""
        return sum(int(np.prod(variable.shape)) for variable in self._variables) or None

    @functools.cached_property
    def fingerprint(self) -> str:
        """`fingerprint` of its files, read once."""
        return fingerprint(self.path)

    def identity(self, *, batch_size: int) -> TeacherIdentity:
        """What the spec says of the teacher."""
        return TeacherIdentity(
            fingerprint=self.fingerprint,
            value_range=self.value_range,
            signature=self.signature,
            batch_size=batch_size,
        )

    def __call__(self, views: tf.Tensor) -> tf.Tensor:
        """float32 [B, S, S, 3] in 0..255 to float32 [B, C]; may be called inside a graph."""
        return self._outputs(views if self.value_range == "0..255" else views * self._scale + self._shift)

    def _outputs(self, images: tf.Tensor) -> tf.Tensor:
        """float32 [B, S, S, 3] in the model's own range to float32 [B, C]."""
        return tf.cast(self._call(tf.cast(images, self._dtype)), tf.float32)

    def run(self, crops: tf.Tensor, partner: tf.Tensor, ratio: tf.Tensor) -> np.ndarray:
        """Mixes and runs one batch; arguments as of `mix`, returns float32 [B, C], which may not be finite.

        Raises:
          UserError: it cannot be run, or the output is not [B, C].
        """
        try:
            with self._naming_memory(partner.shape[0]):
                outputs: np.ndarray = self._logits(crops, partner, ratio).numpy()
        except (ValueError, TypeError, tf.errors.InvalidArgumentError) as error:
            raise UserError(
                f"--teacher={self.path}: cannot run on {partner.shape[0]} views of {self._image_size} x "
                f"{self._image_size}: {first_line(error)}"
            ) from error
        check_shape(outputs, (int(partner.shape[0]), self._num_classes), path=str(self.path))
        return outputs

    def _naming_memory(self, views: int) -> contextlib.AbstractContextManager[None]:
        return naming_memory(
            f"--teacher={self.path} runs on {views} views at a time: use a smaller --teacher_batch_size for a new store; one "
            "that exists keeps its own, and needs a device with more memory"
        )

    def run_in_range(self, crops: np.ndarray, value_range: str) -> np.ndarray:
        """Runs unmixed crops, uint8 [B, S, S, 3], as a model of another value range: float32 [B, C]."""
        scale, shift = (tf.constant(number, tf.float32) for number in VALUE_RANGES[value_range])
        with self._naming_memory(len(crops)):
            outputs: np.ndarray = self._in_range(tf.constant(crops), scale, shift).numpy()
        return outputs

    def logits(
        self,
        crops: tf.Tensor,
        partner: tf.Tensor,
        ratio: tf.Tensor,
        *,
        name_row: Callable[[int], str] = "row {} of the batch".format,
    ) -> np.ndarray:
        """`run`, with finite logits.

        Args:
          crops, partner, ratio: see `mix`.
          name_row: names a row of the batch in the message.

        Raises:
          UserError: see `run`.
          DataError: the output is not finite.
        """
        logits = self.run(crops, partner, ratio)
        if not np.isfinite(logits).all():
            row, column = np.argwhere(~np.isfinite(logits))[0]
            raise DataError(
                f"--teacher={self.path}: logit {column} of {name_row(int(row))} is {logits[row, column]}; expected finite "
                "numbers"
            )
        return logits

    def check_rows(self, crops: np.ndarray) -> None:
        """Checks that outputs are functions of one row; see `trial.check_rows`.

        Args:
          crops: uint8 [K, S, S, 3], a batch of B <= K crops and any others, as of a batch of views.

        Raises:
          UserError: they depend on chance, or on the rest of the batch.
        """
        size = self._batch_size or len(crops)
        rest = crops[size:]  # of no matter, but with them the graph is that of the views
        itself, whole = tf.range(size), tf.ones([size])

        def run(rows: np.ndarray) -> np.ndarray:
            return self.run(tf.constant(np.concatenate([rows, rest])), itself, whole)

        graph = self._logits.get_concrete_function(tf.constant(crops), itself, whole).graph
        check_rows(run, crops[:size], tolerance=tolerance_of(graph), path=str(self.path))


def check_shape(outputs: np.ndarray, expected: tuple[int, int], *, path: str) -> None:
    """Compares the shape of a teacher's outputs with [B, C].

    Raises:
      UserError: it is another; says how to export two logits where there is one.
    """
    if outputs.shape == expected:
        return
    advice = ""
    if expected[1] == 2 and outputs.shape in ((expected[0], 1), (expected[0],)):
        advice = "; a single logit z of class 1 is the two logits [0, z]: export `tf.concat([tf.zeros_like(z), z], axis=-1)`"
    raise UserError(
        f"--teacher={path}: gives {outputs.shape}, expected {expected}: the data set has {expected[1]} classes{advice}"
    )
