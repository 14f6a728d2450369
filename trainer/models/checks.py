"""Checks of a student of the user before the first step: what a built-in student has by construction."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from pipeline.errors import UserError
from pipeline.errors.causes import first_line
from pipeline.inputs.teacher_checks import trial_crops

_TRIAL = 4  # views of the trial run
# The sum of a row of softmax in float32; linear outputs hit it by chance only.
_SUM_TOLERANCE = 1e-3
_PYTHON_OPS = {"PyFunc", "EagerPyFunc", "PyFuncStateless"}


def checked_student(model: Any, *, name: str, num_classes: int, image_size: int) -> tf.keras.Model:
    """Checks a student and returns it as a model of the form of all students.

    Args:
      model: what the user's function returned, or the loaded model.
      name: value of `student`, for messages.
      num_classes: C.
      image_size: S in pixels.

    Returns:
      A model from float32 [B, S, S, 3] in 0..255 to float32 logits [B, C]: the same model, or one that shares its layers.

    Raises:
      UserError: names the first reason why it cannot be trained, evaluated and exported like other students.
    """
    what = f"`student`={name}"
    if not isinstance(model, tf.keras.Model):
        kind = f"{type(model).__module__}.{type(model).__name__}"
        raise UserError(f"{what}: is a {kind}, expected a tf.keras.Model of Keras 2")
    model = _with_inputs(model, what, image_size)
    _check_input(model, what, image_size)
    _check_output(model, what, num_classes)
    if not model.trainable_weights:
        raise UserError(f"{what}: has no trainable weights; expected a model with `trainable=True`")
    if model.outputs[0].dtype != tf.float32:  # under mixed precision
        logits = tf.keras.layers.Activation("linear", dtype=tf.float32, name="float32_logits")(
            model.outputs[0]
        )
        model = tf.keras.Model(model.inputs, logits, name=model.name)
    _try_run(model, what, num_classes, image_size)
    return model


def _with_inputs(model: tf.keras.Model, what: str, image_size: int) -> tf.keras.Model:
    """The model itself if it is made of layers; a model around it if its `call` is written in Python."""
    if getattr(model, "inputs", None):
        return model
    image = tf.keras.Input((image_size, image_size, 3), dtype=tf.float32, name="image")
    try:
        outputs = model(image)
    except Exception as error:  # any, from the user's `call`
        raise UserError(
            f"{what}: cannot run on views float32 [B, {image_size}, {image_size}, 3]: {first_line(error)}"
        ) from error
    if getattr(model, "inputs", None):  # a Sequential model
        return model
    return tf.keras.Model(image, outputs, name=model.name)


def _check_input(model: tf.keras.Model, what: str, image_size: int) -> None:
    if len(model.inputs) != 1 or len(model.outputs) != 1:
        raise UserError(
            f"{what}: has {len(model.inputs)} inputs and {len(model.outputs)} outputs, expected one of each: views to logits"
        )
    expected = tf.TensorShape([None, image_size, image_size, 3])
    shape, dtype = model.inputs[0].shape, model.inputs[0].dtype
    if not dtype.is_floating or not shape.is_compatible_with(expected) or shape[0] is not None:
        raise UserError(
            f"{what}: takes {dtype.name} {shape}, expected views float32 {expected} in 0..255; build it for this `image_size`"
        )


def _check_output(model: tf.keras.Model, what: str, num_classes: int) -> None:
    output = model.outputs[0]
    if not output.dtype.is_floating or not output.shape.is_compatible_with([None, num_classes]):
        raise UserError(
            f"{what}: returns {output.dtype.name} {output.shape}, expected float32 logits (None, {num_classes}): one per class of the "
            "teacher"
        )
    layer = output.node.layer
    while getattr(layer, "outputs", None):  # a nested model
        layer = layer.outputs[0].node.layer
    activation = getattr(getattr(layer, "activation", None), "__name__", None)
    # A trial run can recognize a softmax, but no sigmoid.
    if activation in ("softmax", "sigmoid", "hard_sigmoid"):
        raise UserError(
            f"{what}: ends in {activation}, so that it returns probabilities, expected logits; remove the last activation"
        )


def _try_run(model: tf.keras.Model, what: str, num_classes: int, image_size: int) -> None:
    """Runs the model on a few pictures, in inference mode."""
    views = tf.constant(trial_crops(_TRIAL, image_size), tf.float32)
    run = tf.function(lambda images: model(images, training=False))
    try:
        graph = run.get_concrete_function(
            tf.TensorSpec([None, *views.shape[1:]], tf.float32)
        ).graph.as_graph_def()
        outputs = run(views).numpy()
    except Exception as error:  # any, from the user's layers
        raise UserError(
            f"{what}: cannot run on {_TRIAL} views of {image_size} pixels: {first_line(error)}"
        ) from error
    nodes = [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
    if python := sorted({node.op for node in nodes} & _PYTHON_OPS):
        raise UserError(
            f"{what}: runs Python code in its graph ({python[0]}), which cannot be exported; use TensorFlow operations only"
        )
    if outputs.shape != (_TRIAL, num_classes):
        raise UserError(
            f"{what}: returns {outputs.shape} for {_TRIAL} views, expected {(_TRIAL, num_classes)}"
        )
    if (outputs >= 0).all() and np.abs(outputs.sum(axis=1) - 1).max() <= _SUM_TOLERANCE:
        raise UserError(
            f"{what}: returns probabilities (none is negative, each row sums to 1), expected logits; remove the last activation"
        )
