"""Loads saved Keras models whose layers can be trained."""

from __future__ import annotations

from pathlib import Path

import tensorflow as tf

from pipeline.errors import UserError
from pipeline.errors.causes import first_line
from pipeline.inputs.keras_file import load_keras_file


def load_keras_model(path: str, *, parameter: str) -> tf.keras.Model:
    """Loads a Keras SavedModel, whose graph may run any code, or a `.keras` file, which runs none.

    Args:
      path: path of the model.
      parameter: parameter with this path, for messages.

    Raises:
      UserError: there is no such model, or it is not a Keras model of layers with one input and one output.
    """
    if not Path(path).exists():
        raise UserError(
            f"`{parameter}`={path}: no such file or directory; expected a Keras SavedModel or a .keras file"
        )
    if (Path(path) / "saved_model.pb").is_file() and not (Path(path) / "keras_metadata.pb").is_file():
        raise UserError(
            f"`{parameter}`={path}: this SavedModel was not written by Keras; expected a Keras model, whose layers can be trained"
        )
    try:
        if Path(path).is_dir():
            model = tf.keras.models.load_model(path, compile=False)
        else:
            model = load_keras_file(path, parameter=parameter)
    except (ValueError, OSError, TypeError, KeyError, AttributeError, tf.errors.OpError) as error:
        raise UserError(f"`{parameter}`={path}: Keras cannot load it: {first_line(error)}") from error
    single = (
        isinstance(model, tf.keras.Model)
        and len(getattr(model, "inputs", None) or ()) == 1
        and len(getattr(model, "outputs", None) or ()) == 1
    )
    if not single:
        raise UserError(
            f"`{parameter}`={path}: is a {type(model).__name__}; expected a Keras model of layers with one input and one output"
        )
    return model
