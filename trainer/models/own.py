"""Students of the user: a function that builds a Keras model, or a saved Keras model whose weights are the start."""

from __future__ import annotations

import difflib
import importlib
import operator
import traceback
from pathlib import Path
from typing import Any

import tensorflow as tf

from pipeline.errors import DataError, UserError
from pipeline.errors.causes import first_line
from trainer.models.keras_model import load_keras_model


def student_from_function(name: str, num_classes: int, image_size: int) -> Any:
    """Calls `module:function` with the number of classes and the image size; returns what it returns.

    Raises:
      UserError: the function cannot be imported, or it failed.
    """
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # any, from the user's module
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and f"{module_name}.".startswith(f"{missing}."):
            raise UserError(
                f"`student`={name}: no module {missing}; run the command where it is, or add its directory to PYTHONPATH"
            ) from error
        raise UserError(f"`student`={name}: cannot import {module_name}: {_with_place(error)}") from error
    try:
        function = operator.attrgetter(attribute)(module)
    except AttributeError as error:
        close = difflib.get_close_matches(attribute, vars(module), n=1)
        hint = f"; did you mean {module_name}:{close[0]}?" if close else ""
        raise UserError(f"`student`={name}: {module_name} has no {attribute}{hint}") from error
    if not callable(function):
        raise UserError(f"`student`={name}: is a {type(function).__name__}, expected a function")
    try:
        return function(num_classes, image_size)
    except (UserError, DataError):
        raise
    except Exception as error:  # any, from the user's function
        raise UserError(
            f"`student`={name}: failed for {num_classes} classes at {image_size} pixels: {_with_place(error)}"
        ) from error


def _with_place(error: Exception) -> str:
    """Type and message of an exception, and the line that raised it."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {first_line(error)} ({Path(last.filename).name}, line {last.lineno})"


def student_from_path(name: str, *, precision: str) -> tf.keras.Model:
    """Loads a student with its weights from a Keras SavedModel, whose graph may run any code, or a `.keras` file.

    Raises:
      UserError: there is no such model, or it cannot be trained in this precision.
    """
    if precision != "float32":
        raise UserError(
            f"`precision`={precision}: has no effect on a saved model, whose layers have their precision; omit it, or build the "
            f"student by a function and pass its weights with --init={name}"
        )
    return load_keras_model(name, parameter="student")
