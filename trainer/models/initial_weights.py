"""Loads initial weights from a file into any model: by name, then by shape.

Names that Keras numbers automatically, such as `conv2d_17`, depend on what a process built before. They are compared by
their rank among the layers of that class instead.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import tensorflow as tf

from pipeline.errors import DataError, UserError
from pipeline.errors.causes import first_line
from pipeline.inputs.keras_file import load_keras_file
from trainer.models.bit import PublishedWeights, without_leading_ones
from trainer.models.layers import leaf_layers

_LISTED = 8  # names per line of the report
Shapes = Mapping[str, tuple[int, ...]]


def load_initial_weights(model: tf.keras.Model, path: str, *, skip: Collection[tf.Variable] = ()) -> str:
    """Loads what a model has of a file's weights, by name and then by shape; the others stay as they are.

    A weight of a known name and another shape, such as a head of another width, is not loaded. Layers of unknown names are
    loaded by shape where it is unambiguous: where the file has as many layers with weights of such kinds (`kernel`, for
    example) and shapes as the model, and if these are at least half of the model's weights.

    Args:
      model: model to load into.
      path: BiT `.npz`, `.keras` file, HDF5 file of weights (`.h5`), or SavedModel directory.
      skip: variables to leave as they are.

    Returns:
      A report of one to three lines: how many weights were loaded, which were not, and what of the file was not used.

    Raises:
      UserError: the file cannot be read, or no weight of it fits.
      DataError: an array is damaged or contains a number that is not finite.
    """
    arrays, names = _read(path, model)
    normalizations = [one for one in leaf_layers(model) if isinstance(one, tf.keras.layers.Normalization)]
    # How a student scales pixels is part of it, not of its weights.
    skipped = {id(variable) for variable in [*skip, *(w for one in normalizations for w in one.weights)]}
    weights = dict(zip(names, model.weights, strict=True))
    weights = {name: variable for name, variable in weights.items() if id(variable) not in skipped}
    wanted = {name: tuple(variable.shape) for name, variable in weights.items()}
    found = {name: array.shape for name, array in arrays.items()}
    pairs = _pair(wanted, found)
    fits = {
        name: other
        for name, other in pairs.items()
        if without_leading_ones(found[other], len(wanted[name])) == wanted[name]
    }
    if not fits:
        own = map(_own_name, weights.values())
        raise UserError(
            f"`init`={path}: none of its {len(arrays)} arrays ({_list(arrays, most=2)}) fits a weight of {model.name} "
            f"({_list(own, most=2)}); expected weights of the same network"
        )
    values = {name: _checked(arrays[other], what=f"`init`={path}: {other}") for name, other in fits.items()}
    for name, value in values.items():
        weights[name].assign(value.reshape(wanted[name]).astype(weights[name].dtype.as_numpy_dtype))
    fresh = [
        f"{_own_name(variable)} {wanted[name]}"
        + (f" ({found[pairs[name]]} in the file)" if name in pairs else "")
        for name, variable in weights.items()
        if name not in fits
    ]
    return _report(fits, fresh=fresh, unused=_without(found, pairs.values()))


def _report(fits: Mapping[str, str], *, fresh: Collection[str], unused: Collection[str]) -> str:
    by_name = sum(name == other for name, other in fits.items())
    lines = [
        f"loaded {len(fits)} of {len(fits) + len(fresh)} weights ({by_name} by name, {len(fits) - by_name} by shape)"
    ]
    if fresh:
        lines.append(f"not loaded, initialized: {_list(fresh)}")
    if unused:
        lines.append(f"not used of the file: {_list(unused)}")
    return "\n".join(lines)


def _pair(wanted: Shapes, found: Shapes) -> dict[str, str]:
    """Names of the model with those of the file: equal names with any shape, then layers of equal shapes."""
    by_name = {name: name for name in wanted if name in found}
    by_shape = _match_shapes(_without(wanted, by_name), _without(found, by_name))
    # Some layers of any two networks have equal shapes.
    return by_name | (by_shape if 2 * len(by_shape) >= len(wanted) else {})


def _own_name(variable: tf.Variable) -> str:
    return str(variable.name).split(":")[0]


def _checked(array: np.ndarray, *, what: str) -> np.ndarray:
    """Refuses arrays that are not finite numbers."""
    try:
        finite = np.isfinite(array).all()
    except TypeError as error:
        raise UserError(f"{what} is {array.dtype}, expected a type of numbers") from error
    if not finite:
        raise DataError(f"{what} contains a number that is not finite")
    return array


def _without(shapes: Shapes, names: Collection[str]) -> Shapes:
    return {name: shape for name, shape in shapes.items() if name not in names}


def _list(names: Iterable[str], *, most: int = _LISTED) -> str:
    known = list(names)
    more = f" and {len(known) - most} more" if len(known) > most else ""
    return ", ".join(known[:most]) + more


def _match_shapes(wanted: Shapes, found: Shapes) -> dict[str, str]:
    """Pairs layers whose weights have the same kinds and shapes, in order, where there are equally many of both."""
    ours, theirs = _layers_by_shape(wanted), _layers_by_shape(found)
    return {
        name: other
        for signature, layers in ours.items()
        if len(layers) == len(theirs.get(signature, ()))
        for layer, same in zip(layers, theirs[signature], strict=True)
        for name, other in zip(layer, same, strict=True)
    }


def _layers_by_shape(shapes: Shapes) -> dict[Any, list[list[str]]]:
    """Names of weights by layer, and the layers by the kinds and shapes of their weights, in order."""
    by_layer = defaultdict(list)
    for name in shapes:
        layer, _, kind = name.rpartition("/")
        by_layer[layer].append((kind, shapes[name], name))
    out = defaultdict(list)
    for weights in map(sorted, by_layer.values()):
        out[tuple(weight[:2] for weight in weights)].append([name for *_, name in weights])
    return out


def _read(path: str, model: tf.keras.Model) -> tuple[dict[str, np.ndarray], list[str]]:
    """Reads the arrays of a file by name.

    Returns:
      The arrays, and the names that a file of this kind has for the weights of the model.

    Raises:
      UserError: it is no file of weights, or cannot be read.
      DataError: an array is damaged.
    """
    place = Path(path)
    classes = {type(layer).__name__ for layer in leaf_layers(model)}
    names = _stable_names([variable.name for variable in model.weights], classes)
    if place.suffix == ".npz":
        weights = PublishedWeights(place)
        with np.load(place, allow_pickle=False) as arrays:
            return {name: weights.read(arrays, name) for name in weights.shapes}, names
    if place.suffix not in (".h5", ".hdf5"):
        variables = _variables(path)
        theirs = _stable_names([variable.name for variable in variables], classes)
        return {name: v.numpy() for name, v in zip(theirs, variables, strict=True)}, names
    try:
        with h5py.File(place) as file:
            group = file.get("model_weights", file)  # a whole model, or its weights
            if (
                "layer_names" not in group.attrs
            ):  # `.weights.h5` of Keras 2.12 and later, which names layers by class
                by_class = dict(_class_names(model, "layers"))
                return _arrays_by_class(group), [
                    by_class.get(id(variable), name)
                    for name, variable in zip(names, model.weights, strict=True)
                ]
            listed = [(name, group[key][()]) for key, name in _listed_weights(group)]
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"`init`={path}: cannot be read as weights in HDF5: {first_line(error)}") from error
    theirs = _numbered(_stable_names([name for name, _ in listed], classes))
    return dict(zip(theirs, [array for _, array in listed], strict=True)), _numbered(names)


def _variables(path: str) -> Sequence[tf.Variable]:
    """The variables of a `.keras` file, or of a SavedModel, whose graph is loaded and not run."""
    place = Path(path)
    if place.suffix == ".keras":
        return list(load_keras_file(place, parameter="init").weights)
    if not (place / "saved_model.pb").is_file():
        raise UserError(
            f"`init`={path}: expected a BiT .npz, a .keras file, weights in HDF5 (.h5), or a SavedModel directory"
        )
    try:
        loaded: Any = tf.saved_model.load(path)
    except (ValueError, OSError, KeyError, tf.errors.OpError) as error:
        raise UserError(f"`init`={path}: TensorFlow cannot load it: {first_line(error)}") from error
    variables = getattr(loaded, "variables", None) or [
        variable for _, function in sorted(loaded.signatures.items()) for variable in function.variables
    ]
    return list({id(variable): variable for variable in variables}.values())


def _listed_weights(group: Any) -> Iterator[tuple[str, str]]:
    """Keys and names of the arrays in an HDF5 file that lists its layers. The oldest have weights without their layer."""
    for layer in map(_text, group.attrs["layer_names"]):
        for weight in map(_text, group[layer].attrs["weight_names"]):
            yield f"{layer}/{weight}", weight if "/" in weight else f"{layer}/{weight}"


def _arrays_by_class(group: Any) -> dict[str, np.ndarray]:
    """Arrays such as `layers/conv2d_1/vars/0` in the order of the layers, without those of an optimizer."""
    keys: list[str] = []
    group.visititems(lambda key, item: keys.append(key) if isinstance(item, h5py.Dataset) else None)
    keys.sort(key=lambda key: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", key)])
    return {
        key.replace("_layer_checkpoint_dependencies/", "layers/"): group[key][()]
        for key in keys
        if not key.startswith("optimizer/")
    }


def _class_names(model: tf.keras.Model, prefix: str) -> Iterator[tuple[int, str]]:
    """Ids of a model's weights, and their names by the classes of the layers, such as `layers/conv2d_1/vars/0`."""
    counts: dict[str, int] = defaultdict(int)
    for layer in model.layers:
        kind = _snake_case(type(layer).__name__)
        path = f"{prefix}/{kind}" + (f"_{counts[kind]}" if counts[kind] else "")
        counts[kind] += 1
        if isinstance(layer, tf.keras.Model):
            yield from _class_names(layer, f"{path}/layers")
        else:
            yield from ((id(weight), f"{path}/vars/{n}") for n, weight in enumerate(layer.weights))


def _stable_names(names: Sequence[str], classes: Iterable[str]) -> list[str]:
    """Names of variables with automatic numbers counted from the first layer of a class: `conv2d_17/kernel:0` to `conv2d_1/kernel`.

    Args:
      names: names in the order of the layers.
      classes: names of classes of layers, in addition to Keras's.
    """
    automatic = {_snake_case(name) for name in (*dir(tf.keras.layers), *classes)}
    ranks: dict[str, dict[str, int]] = defaultdict(dict)
    seen: dict[str, int] = defaultdict(int)
    out = []
    for name in names:
        layer, _, weight = name.split(":")[0].rpartition("/")
        base = re.sub(r"_\d+$", "", layer)
        if base in automatic:
            rank = ranks[base].setdefault(layer, len(ranks[base]))
            layer = f"{base}_{rank}" if rank else base
        stable = f"{layer}/{weight}"
        seen[stable] += 1
        # Nested models may have layers of equal names.
        out.append(stable if seen[stable] == 1 else f"{stable}#{seen[stable]}")
    return out


def _numbered(names: Iterable[str]) -> list[str]:
    """Weights by their position in the layer, which is the contract of HDF5 files that list layers: `conv/kernel` to `conv/0`."""
    counts: dict[str, int] = defaultdict(int)
    out = []
    for name in names:
        layer = name.rpartition("/")[0]
        out.append(f"{layer}/{counts[layer]}")
        counts[layer] += 1
    return out


def _snake_case(name: str) -> str:
    """Keras's name for a layer of a class: `Conv2D` to `conv2d`."""
    name = re.sub("(.)([A-Z][a-z0-9]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
