"""The network to fine-tune: with random weights, from a published checkpoint, or a Keras model with a new head."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import tensorflow as tf

from pipeline.cli.choices import VALUE_RANGES
from pipeline.errors import UserError
from pipeline.inputs.teacher import fingerprint
from pipeline.storage.files import sha256_of
from trainer import models
from trainer.models.initial_weights import load_initial_weights
from trainer.models.keras_model import load_keras_model
from trainer.models.layers import head_layer, seeded_layers


def build_network(
    flags: argparse.Namespace, *, num_classes: int, image_size: int
) -> tuple[tf.keras.Model, dict[str, Any]]:
    """Builds the network to fine-tune, with a new head.

    Args:
      flags: `model` and `init`, or `teacher` and `teacher_value_range`.

    Returns:
      A model from float32 [B, S, S, 3] in 0..255 to logits [B, C], and the origin of its weights, for checkpoints.

    Raises:
      UserError: the weights cannot be loaded or have other shapes.
    """
    if flags.teacher is not None:
        with seeded_layers():
            model = load_keras_model(flags.teacher, parameter="teacher")
        network = replace_head(
            model,
            num_classes=num_classes,
            image_size=image_size,
            value_range=flags.teacher_value_range,
        )
        return network, {"teacher": fingerprint(flags.teacher), "value_range": flags.teacher_value_range}
    network = models.build_student(flags.model, num_classes=num_classes, image_size=image_size)
    if flags.init is None:
        return network, {"model": flags.model, "init": None}
    report = load_initial_weights(network, flags.init, skip=head_layer(network).weights)
    print(f"--init={flags.init}: {report}", flush=True)
    digest = sha256_of(Path(flags.init)) if flags.init.endswith(".npz") else fingerprint(flags.init)
    return network, {"model": flags.model, "init": digest}


def replace_head(
    model: tf.keras.Model, *, num_classes: int, image_size: int, value_range: str
) -> tf.keras.Model:
    """Replaces the head of a network by a zero head with another number of classes, for views in 0..255.

    Args:
      model: Model whose last layer is Dense, optionally followed by a softmax (which is removed), or is a model of this
        kind.
      value_range: Range of the pixels that the model expects, one of `VALUE_RANGES`. Any but 0..255 adds a layer.

    Returns:
      A model that shares all layers but the last.

    Raises:
      UserError: the model ends in another layer, or takes images of another shape.
    """
    features, dense = _cut_head(model, path=model.name)
    wanted = tf.TensorShape([None, image_size, image_size, 3])
    shape = model.inputs[0].shape
    if not shape.is_compatible_with(wanted):
        raise UserError(
            f"--teacher: {model.name} takes {shape}, but views are {wanted}; pass a matching --image_size"
        )
    head = tf.keras.layers.Dense(num_classes, kernel_initializer="zeros", dtype=tf.float32, name=dense.name)
    if value_range == "0..255":
        return tf.keras.Model(model.inputs, head(features), name=model.name)
    scale, offset = VALUE_RANGES[value_range]
    image = tf.keras.Input(wanted[1:], dtype=tf.float32, name="image")
    body = tf.keras.Model(model.inputs, features, name=f"{model.name}_body")
    scaled = tf.keras.layers.Rescaling(scale, offset=offset, dtype=tf.float32, name="scale")(image)
    return tf.keras.Model(image, head(body(scaled)), name=model.name)


def _cut_head(model: tf.keras.Model, *, path: str) -> tuple[Any, tf.keras.layers.Dense]:
    """Finds the last Dense layer of a model, also inside a nested model, and its input.

    Args:
      path: Names of the enclosing models and of this one, for messages.

    Returns:
      The symbolic input tensor of the layer in the model's graph, and the layer.
    """
    node = model.outputs[0].node
    while isinstance(node.layer, tf.keras.layers.Softmax | tf.keras.layers.Activation):
        node = node.keras_inputs[0].node
    layer = node.layer
    if isinstance(layer, tf.keras.layers.Dense):
        return node.keras_inputs[0], layer
    if isinstance(layer, tf.keras.Model) and getattr(layer, "outputs", None):
        features, dense = _cut_head(layer, path=f"{path}/{layer.name}")
        inner = tf.keras.Model(layer.inputs, features, name=layer.name)
        # With the same `training`, because False freezes batch normalization.
        training = node.call_kwargs.get("training")
        return inner(node.keras_inputs[0], **({} if training is None else {"training": training})), dense
    raise UserError(
        f"--teacher: {path} ends in {layer.name}, a {type(layer).__name__}; expected a Dense layer to replace; end the model "
        "with pooling and a Dense layer, such as a keras.applications model with include_top=False and pooling='avg', "
        "followed by a Dense layer"
    )
