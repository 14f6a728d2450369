"""Loads a teacher, fingerprints it, and turns views into logits.

A SavedModel is code: load only what you trust. `.keras` files are loaded in Keras's safe mode.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import tensorflow as tf

from pipeline.buckets.copies import copied_teacher
from pipeline.buckets.directory import is_url
from pipeline.choices import DEFAULT_SIGNATURE, VALUE_RANGES, check_value_range
from pipeline.errors import DataError, UserError, first_line
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


class Teacher:
    """A classifier: views float32 [B, S, S, 3] in 0..255 to logits float32 [B, C].

    Attributes:
      path: of the SavedModel directory or `.keras` file; for a URL, of its copy on this machine.
      signature: of the SavedModel that is called.
      value_range: that the model wants its input in; one of `VALUE_RANGES`.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        image_size: int,
        num_classes: int,
        value_range: str = "0..255",
        signature: str = DEFAULT_SIGNATURE,
    ) -> None:
        check_value_range(value_range)
        self.path = copied_teacher(str(path)) if is_url(path) else Path(path)
        self.signature = signature
        self.value_range = value_range
        self._image_size = image_size
        self._num_classes = num_classes
        self._scale, self._shift = VALUE_RANGES[value_range]
        if not self.path.exists():
            raise UserError(
                f"--teacher={path}: no such file or directory; expected a SavedModel or a .keras file"
            )
        if self.path.is_file():
            self._load_keras()
        else:
            self._load_saved_model()
        self._logits = tf.function(
            lambda crops, partner, ratio: self(mix(crops, partner, ratio)), reduce_retracing=False
        )

    def _load_keras(self) -> None:
        if self.path.suffix != ".keras":
            raise UserError(f"--teacher={self.path}: expected a SavedModel directory or a .keras file")
        try:
            self._model = tf.keras.models.load_model(self.path, compile=False, safe_mode=True)
        except (ValueError, OSError, TypeError, KeyError) as error:
            raise UserError(f"--teacher={self.path}: Keras cannot load it: {first_line(error)}") from error
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
        wanted = tf.TensorShape([None, self._image_size, self._image_size, 3])
        if not self._dtype.is_floating or not shape.is_compatible_with(wanted):
            raise UserError(
                f"--teacher={self.path}: takes {self._dtype.name} {shape}, but views are float32 "
                f"[B, {self._image_size}, {self._image_size}, 3]; choose --image_size to match"
            )

    @property
    def num_parameters(self) -> int | None:
        """Numbers in the variables that it is made of; None where they were frozen into constants."""
        return sum(int(np.prod(variable.shape)) for variable in self._variables) or None

    def identity(self, *, batch_size: int) -> TeacherIdentity:
        """What the spec says of the teacher."""
        return TeacherIdentity(
            fingerprint=fingerprint(self.path),
            value_range=self.value_range,
            signature=self.signature,
            batch_size=batch_size,
        )

    def __call__(self, views: tf.Tensor) -> tf.Tensor:
        """float32 [B, S, S, 3] in 0..255 to float32 [B, C]; may be called inside a graph."""
        images = views if self.value_range == "0..255" else views * self._scale + self._shift
        return tf.cast(self._call(tf.cast(images, self._dtype)), tf.float32)

    def logits(self, crops: tf.Tensor, partner: tf.Tensor, ratio: tf.Tensor) -> np.ndarray:
        """Mixes and runs one batch, checked; arguments as of `mix`, returns float32 [B, C].

        Raises:
          UserError: the output is not [B, C] logits.
          DataError: the output is not finite.
        """
        try:
            logits = self._logits(crops, partner, ratio).numpy()
        except (ValueError, TypeError, tf.errors.InvalidArgumentError) as error:
            raise UserError(
                f"--teacher={self.path}: cannot run on {partner.shape[0]} views of {self._image_size} x "
                f"{self._image_size}: {first_line(error)}"
            ) from error
        expected = (int(partner.shape[0]), self._num_classes)
        if logits.shape != expected:
            raise UserError(
                f"--teacher={self.path}: gives {logits.shape}, expected {expected}: the data set has "
                f"{self._num_classes} classes"
            )
        if not np.isfinite(logits).all():
            row, column = np.argwhere(~np.isfinite(logits))[0]
            raise DataError(
                f"--teacher={self.path}: logit {column} of view {row} of the batch is {logits[row, column]}; "
                "expected finite numbers"
            )
        return logits

    def check_logits(self, logits: np.ndarray) -> None:
        """Refuses probabilities, float32 [B, C]: their KL would be quietly wrong.

        Raises:
          UserError: all rows lie in 0..1 and sum to 1.
        """
        if logits.min() >= 0 and logits.max() <= 1 and np.allclose(logits.sum(axis=1), 1, atol=1e-3):
            raise UserError(
                f"--teacher={self.path}: its output is probabilities, expected logits; export it without its softmax"
            )
