"""Layers of a model, and copies of models with changed layers: other precision, synchronized batch normalization."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from pipeline.errors import UserError
from pipeline.errors.causes import first_line

# A layer and its config to the config of the copy.
Change = Callable[[tf.keras.layers.Layer, dict[str, Any]], dict[str, Any]]


def rebuild(model: tf.keras.Model, change: Change) -> tf.keras.Model:
    """A copy of a model, with the same names and values of weights, whose layers have changed configs.

    Layers inside nested models are changed, too. Layers inside other layers are not.

    Args:
      model: functional or Sequential model.
      change: returns the changed config of a layer; the number and shapes of its weights must stay.

    Raises:
      UserError: a layer cannot be made from its config.
    """
    layer = None

    def clone(original: tf.keras.layers.Layer) -> tf.keras.layers.Layer:
        nonlocal layer
        layer = original
        if isinstance(original, tf.keras.Sequential) or _is_functional(original):
            return tf.keras.models.clone_model(original, clone_function=clone)
        return type(original).from_config(change(original, original.get_config()))

    try:
        with seeded_layers():
            copy = tf.keras.models.clone_model(model, clone_function=clone)
    except (NotImplementedError, TypeError, ValueError) as error:
        what = "" if layer is None else f" of layer {layer.name} ({type(layer).__name__})"
        raise UserError(
            f"{model.name}: cannot be rebuilt from its configuration{what}: {first_line(error)}; give the layer a `get_config` that "
            "returns the arguments of its constructor"
        ) from error
    before, after = model.weights, copy.weights
    if [tuple(w.shape) for w in before] != [tuple(w.shape) for w in after]:
        raise UserError(
            f"{model.name}: a copy that is rebuilt from its configuration has {len(after)} weights, expected the model's "
            f"{len(before)} with the same shapes"
        )
    for ours, theirs in zip(after, before, strict=True):
        ours.assign(theirs)
    for one in leaf_layers(copy):
        if isinstance(one, tf.keras.layers.Normalization):
            one.finalize_state()  # it computes with copies of its weights
    return copy


@contextlib.contextmanager
def seeded_layers() -> Iterator[None]:
    """Makes Keras's random layers that are created inside use generators, which `trainer.models.randomness.Generators` sets."""
    experimental = tf.keras.backend.experimental
    before = experimental.is_tf_random_generator_enabled()
    experimental.enable_tf_random_generator()
    try:
        yield
    finally:
        if not before:
            experimental.disable_tf_random_generator()


def _is_functional(layer: tf.keras.layers.Layer) -> bool:
    return isinstance(layer, tf.keras.Model) and bool(getattr(layer, "_is_graph_network", False))


def leaf_layers(model: tf.keras.Model) -> list[tf.keras.layers.Layer]:
    """All layers of a model in order, those inside nested models and other layers included; no models."""
    layers = model._flatten_layers(include_self=False)
    return [layer for layer in layers if not isinstance(layer, tf.keras.Model)]


def head_layer(model: tf.keras.Model) -> tf.keras.layers.Layer:
    """The last layer with weights."""
    return [layer for layer in model.layers if layer.weights][-1]
