"""The teacher: loads and fingerprints a model, checks it, and computes logits of views.

A SavedModel is code: load only trusted ones. Code in `.keras` files does not run; see `pipeline.inputs.keras_file`.
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
from pipeline.cli.parser import check_model
from pipeline.errors import DataError, UserError
from pipeline.errors.causes import first_line
from pipeline.inputs.device_memory import naming_memory
from pipeline.inputs.keras_file import load_keras_file
from pipeline.inputs.teacher_checks import check_rows, tolerance_of, trial_crops
from pipeline.storage.bucket import is_url
from pipeline.storage.copies import copied_teacher
from pipeline.store.identity import TeacherIdentity
from pipeline.views.mix import mix

_BLOCK = 1 << 20
_ONE_LOGIT = (
    "for a single logit z of class 1, export the two logits `tf.concat([tf.zeros_like(z), z], axis=-1)`"
)


def fingerprint(path: str | Path) -> str:
    """SHA-256 over the relative names and contents of a SavedModel's files, or of one file: 64 hex digits."""
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


def local_teacher(path: str | Path, *, parameter: str = "teacher") -> Path:
    """Path of a teacher on this machine. A teacher in a bucket is copied.

    Args:
      parameter: the parameter that gave the path, for errors.

    Raises:
      UserError: there is no teacher at the path.
    """
    place = copied_teacher(str(path)) if is_url(path) else Path(path)
    check_model(f"`{parameter}`", str(place))
    return place


class Teacher:
    """A classifier: views float32 [B, S, S, 3] in 0..255 to logits float32 [B, C].

    Any saved classifier can be loaded as one, such as a student that is evaluated.

    Attributes:
      path: SavedModel directory or `.keras` file; for a URL, that of its copy on this machine.
      signature: signature of the SavedModel; `keras` for a `.keras` file.
      value_range: range of the model's input pixels, one of `VALUE_RANGES`.
      output: name of the output; None for the one that is used by default.
      num_classes: number of classes C.
      image_size: side length S of a view, in pixels.
      fixed_size: the image size S of a model that takes no other; otherwise None.
      fixed_batch_size: the batch size B of a model that takes no other; otherwise None.

    Args:
      path: SavedModel directory or `.keras` file, or its URL.
      image_size: side length S of a view, in pixels.
      num_classes: number of classes C, at least 2; by default that of the output.
      value_range: see Attributes.
      signature: see Attributes.
      output: name of one of several outputs; by default the only one, or the one named `logits`.
      batch_size: number of views B per call, if it is known; a model with another fixed batch size is refused.
      own_size: whether the size that a model's input fixes takes precedence over `image_size`.
      parameter: the parameter that gave the path, for errors.
      batch_parameter: the parameter that gave the batch size, for errors.

    Raises:
      UserError: the teacher does not exist, cannot be loaded, or does not fit the arguments.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        image_size: int,
        num_classes: int | None = None,
        value_range: str = "0..255",
        signature: str = DEFAULT_SIGNATURE,
        output: str | None = None,
        batch_size: int | None = None,
        own_size: bool = False,
        parameter: str = "teacher",
        batch_parameter: str = "teacher_batch_size",
    ) -> None:
        check_value_range(value_range)
        if num_classes is not None:
            check_num_classes(num_classes, of=f"`{parameter}`={path}")
        self._parameter, self._batch_parameter = parameter, batch_parameter
        self.path = local_teacher(path, parameter=parameter)
        self.signature = signature
        self.value_range = value_range
        self.output = output
        self.image_size, self._own_size = image_size, own_size
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
        self.num_classes = self._count_classes() if num_classes is None else num_classes

    def _load_keras(self) -> None:
        self._model = load_keras_file(self.path, parameter=self._parameter)
        inputs, outputs = (getattr(self._model, name, None) or () for name in ("inputs", "outputs"))
        if not inputs:
            size = self.image_size
            raise UserError(
                f"{self.what}: {self._model.name}, a {type(self._model).__name__}, was saved before it was built and "
                f"has no weights; call it on images or `model.build((None, {size}, {size}, 3))`, train it, and save it again"
            )
        if len(inputs) != 1:
            raise UserError(f"{self.what}: has {len(inputs)} inputs, expected one; export such a model")
        self.signature = "keras"
        named = self._model.output
        if not isinstance(named, dict):
            named = dict(zip(self._model.output_names, outputs, strict=True))
        name = self._choose_output({key: tensor.shape for key, tensor in named.items()})
        model = self._model
        if isinstance(model.output, dict | list | tuple):
            model = tf.keras.Model(model.inputs, named[name])
        self._dtype = tf.as_dtype(self._model.inputs[0].dtype)
        self._check_input(self._model.inputs[0].shape)
        self._variables = self._model.variables
        self._call = lambda images: model(images, training=False)

    def _load_saved_model(self) -> None:
        try:
            self._model = tf.saved_model.load(str(self.path))
        except (ValueError, OSError, KeyError, tf.errors.OpError) as error:
            raise UserError(f"{self.what}: TensorFlow cannot load it: {first_line(error)}") from error
        signatures = self._model.signatures
        if self.signature not in signatures:
            raise UserError(
                f"`{self._parameter}_signature`={self.signature}: {self.path} has signatures {', '.join(sorted(signatures)) or 'none'}"
            )
        function = signatures[self.signature]
        inputs = function.structured_input_signature[1]
        if len(inputs) != 1:
            raise UserError(
                f"{self.what}: signature {self.signature} takes {', '.join(sorted(inputs)) or 'nothing'}; expected "
                "one image input"
            )
        name, spec = next(iter(inputs.items()))
        # Sorted: the order in a SavedModel is that of a hash table, another one in each process.
        outputs = sorted(function.structured_outputs.items())
        output = self._choose_output({key: found.shape for key, found in outputs})
        self._dtype = spec.dtype
        self._check_input(spec.shape)
        self._variables = function.variables
        self._call = lambda images: function(**{name: images})[output]

    def _choose_output(self, outputs: dict[str, tf.TensorShape]) -> str:
        """Chooses one of the outputs: the one named, the only one, or `logits`.

        Raises:
          UserError: there is no output of that name, or there are several and none is named.
        """
        listed = ", ".join(f"{name} {shape}" for name, shape in outputs.items())
        default = next(iter(outputs)) if len(outputs) == 1 else "logits" if "logits" in outputs else None
        if self.output is not None and self.output not in outputs:
            raise UserError(
                f"`{self._parameter}_output`={self.output}: {self.path} returns {listed}; name one of them"
            )
        if (chosen := self.output or default) is None:
            raise UserError(
                f"{self.what}: returns {listed}; choose one, such as `{self._parameter}_output`={next(iter(outputs), 'NAME')}"
            )
        self.output = None if chosen == default else chosen  # the default has no place in the identity
        self._output_shape = outputs[chosen]
        return chosen

    def _count_classes(self) -> int:
        """C, from the shape of the output, or from a trial batch if the model does not state it.

        Raises:
          UserError: the output is not [B, C], or C is 1.
        """
        shape = self._output_shape
        if shape.rank is None or shape[-1:].as_list() == [None]:
            size = self._batch_size or 1
            outputs = self._run(
                tf.constant(trial_crops(size, self.image_size)), tf.range(size), tf.ones([size])
            )
            shape = tf.TensorShape(outputs.shape)
        if shape.rank != 2 or shape[1] == 1:
            advice = f"; {_ONE_LOGIT}" if shape[1:].num_elements() == 1 else ""
            raise UserError(f"{self.what}: returns {shape}, expected [B, C] with at least 2 classes{advice}")
        return int(shape[1])

    def _check_input(self, shape: tf.TensorShape) -> None:
        self.fixed_size = shape[1] if shape.rank == 4 and shape[1] == shape[2] else None
        if self._own_size and self.fixed_size is not None:
            self.image_size = self.fixed_size
        size = self.image_size
        takes = f"{self.what}: takes {self._dtype.name} {shape}"
        if not self._dtype.is_floating:
            raise UserError(
                f"{takes}, but views are float32 [B, {size}, {size}, 3] in 0..255; export it with a float32 input and a cast inside "
                "the model"
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
                remedy = f"use `image_size`={shape[1]}"
            raise UserError(f"{takes}, but views are float32 [B, {size}, {size}, 3]; {remedy}")
        self.fixed_batch_size = fixed = shape[0] if shape.rank else None
        if fixed is not None and self._batch_size is not None and fixed != self._batch_size:
            raise UserError(
                f"{takes}: batches of exactly {fixed}, but `{self._batch_parameter}`={self._batch_size}; use "
                f"`{self._batch_parameter}`={fixed}, or export it with a batch dimension of None"
            )

    @property
    def what(self) -> str:
        """The model, for errors: its parameter and path."""
        return f"`{self._parameter}`={self.path}"

    @property
    def num_parameters(self) -> int | None:
        """Number of parameters; None if they were frozen into constants."""
        return sum(int(np.prod(variable.shape)) for variable in self._variables) or None

    @functools.cached_property
    def fingerprint(self) -> str:
        """Fingerprint of its files, computed once."""
        return fingerprint(self.path)

    def identity(self, *, batch_size: int) -> TeacherIdentity:
        """The teacher's identity for a spec."""
        return TeacherIdentity(
            fingerprint=self.fingerprint,
            value_range=self.value_range,
            signature=self.signature,
            batch_size=batch_size,
            output=self.output,
        )

    def __call__(self, views: tf.Tensor) -> tf.Tensor:
        """Computes logits float32 [B, C] of views float32 [B, S, S, 3] in 0..255, eagerly or inside a graph."""
        return self._outputs(views if self.value_range == "0..255" else views * self._scale + self._shift)

    def _outputs(self, images: tf.Tensor) -> tf.Tensor:
        """Computes logits float32 [B, C] of images float32 [B, S, S, 3] in the model's value range."""
        return tf.cast(self._call(tf.cast(images, self._dtype)), tf.float32)

    def run(self, crops: tf.Tensor, partner: tf.Tensor, ratio: tf.Tensor) -> np.ndarray:
        """Mixes one batch and computes its logits, float32 [B, C], which may not be finite.

        Args:
          crops, partner, ratio: see `mix`.

        Raises:
          UserError: the model cannot run on the batch, or its output is not [B, C].
        """
        outputs = self._run(crops, partner, ratio)
        check_shape(outputs, (int(partner.shape[0]), self.num_classes), what=self.what)
        return outputs

    def _run(self, crops: tf.Tensor, partner: tf.Tensor, ratio: tf.Tensor) -> np.ndarray:
        try:
            with self._naming_memory(partner.shape[0]):
                outputs: np.ndarray = self._logits(crops, partner, ratio).numpy()
        except (ValueError, TypeError, tf.errors.InvalidArgumentError) as error:
            raise UserError(
                f"{self.what}: cannot run on {partner.shape[0]} views of {self.image_size} x "
                f"{self.image_size}: {first_line(error)}"
            ) from error
        return outputs

    def _naming_memory(self, views: int) -> contextlib.AbstractContextManager[None]:
        return naming_memory(
            f"{self.what} runs on {views} views at a time; use a smaller `{self._batch_parameter}` for a new store, or a "
            "device with more memory for an existing one"
        )

    def run_in_range(self, crops: np.ndarray, value_range: str) -> np.ndarray:
        """Computes logits float32 [B, C] of unmixed crops uint8 [B, S, S, 3], as if the model had another value range."""
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
        """Mixes one batch and computes its logits, float32 [B, C], which are finite.

        Args:
          crops, partner, ratio: see `mix`.
          name_row: returns the name of a row of the batch, for errors.

        Raises:
          UserError: see `run`.
          DataError: a logit is not finite.
        """
        logits = self.run(crops, partner, ratio)
        if not np.isfinite(logits).all():
            row, column = np.argwhere(~np.isfinite(logits))[0]
            raise DataError(
                f"{self.what}: logit {column} of {name_row(int(row))} is {logits[row, column]}; expected finite "
                "numbers"
            )
        return logits

    def check_rows(self, crops: np.ndarray) -> None:
        """Checks that each output depends on one row only; see `teacher_checks.check_rows`.

        Args:
          crops: uint8 [K, S, S, 3]; the first B are run.

        Raises:
          UserError: outputs depend on chance or on the rest of the batch.
        """
        size = min(self._batch_size or len(crops), len(crops))
        rest = crops[
            size:
        ]  # their content does not matter, but their number gives the same graph as for views
        itself, whole = tf.range(size), tf.ones([size])

        def run(rows: np.ndarray) -> np.ndarray:
            return self.run(tf.constant(np.concatenate([rows, rest])), itself, whole)

        graph = self._logits.get_concrete_function(tf.constant(crops), itself, whole).graph
        check_rows(run, crops[:size], tolerance=tolerance_of(graph), what=self.what)


def check_shape(outputs: np.ndarray, expected: tuple[int, int], *, what: str) -> None:
    """Checks the shape of a teacher's outputs.

    Args:
      expected: (B, C).
      what: the teacher, for errors.

    Raises:
      UserError: the shape differs.
    """
    if outputs.shape != expected:
        advice = f"; {_ONE_LOGIT}" if outputs[0].size == 1 else ""
        raise UserError(f"{what}: returns {outputs.shape}, expected {expected}{advice}")
