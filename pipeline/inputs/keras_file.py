"""Loads `.keras` files without running code in them.

Keras's safe mode only refuses Python lambdas, and only in zip archives. This module passes an archive to Keras only if
every class and function in its config is on a list: Keras's own layers, initializers and so on, and what this process has
registered. It closes these ways around safe mode (Keras 2.15; each has a test):

- HDF5 files named `.keras`, for which the legacy loader runs the bytecode of Lambda layers;
- classes and functions of any module: `import_module` runs that module, and `os.system` is a function;
- layers without `module`, which the legacy deserializer loads;
- TensorFlow functions by name (`TFOpLambda`): `io.write_file`, `print`, `py_function`;
- weights in `model.weights.npz`, which are read with `allow_pickle=True`;
- layers that read files, such as a vocabulary or a SavedModel.

A SavedModel is code and cannot be checked this way: load only trusted ones.
"""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from typing import Any

import tensorflow as tf

from pipeline.cli.environment import KERAS_VARIABLE
from pipeline.errors import UserError
from pipeline.errors.causes import first_line

_CONFIG, _METADATA, _WEIGHTS, _PICKLES = (
    "config.json",
    "metadata.json",
    "model.weights.h5",
    "model.weights.npz",
)
_CONFIG_LIMIT = 64 << 20  # bytes
_HDF5 = b"\x89HDF\r\n\x1a\n"

_NAMESPACES = (
    "layers",
    "layers.experimental",
    "layers.experimental.preprocessing",
    "initializers",
    "regularizers",
    "constraints",
    "mixed_precision",
    # of compiled models inside a model
    "losses",
    "metrics",
    "optimizers",
    "optimizers.legacy",
    "optimizers.schedules",
)
_REFUSED_LAYERS = {"Lambda", "StringLookup", "IntegerLookup", "TextVectorization", "TFSMLayer"}
# Public classes that configs name by their private modules.
_PRIVATE = {
    ("engine.functional", "Functional"),
    ("layers.core.tf_op_layer", "TFOpLambda"),
    ("layers.core.tf_op_layer", "SlicingOpLambda"),
    ("applications.convnext", "LayerScale"),
}
_FAILURES = (
    ValueError,
    OSError,
    TypeError,
    LookupError,
    AttributeError,
    RuntimeError,  # a config nested too deeply, an encrypted archive
    zipfile.BadZipFile,
    tf.errors.OpError,
)
_VALUES = {"__tensor__", "__numpy__", "__bytes__"}
_FUNCTION_MODULES = ("activations", "losses", "metrics")
_OPERATION = re.compile(
    r"(compat\.v1\.)?((math|nn|linalg|image|signal|__operators__)\.\w+(\.\w+)?|broadcast_to|cast|clip_by_value|concat|"
    r"expand_dims|fill|gather|identity|one_hot|ones_like|pad|range|repeat|reshape|reverse|roll|shape|size|slice|split|"
    r"squeeze|stack|stop_gradient|strided_slice|tile|transpose|unstack|where|zeros_like|convert_to_tensor)"
    r"|keras\.activations\.\w+|keras\.backend\.(?!print_tensor)\w+"
)


def check_keras() -> None:
    """Checks that `tf.keras` is Keras 2. Commands choose it; a program of the user's may not have.

    Raises:
      UserError: it is Keras 3, as in TensorFlow 2.16 and later by default.
    """
    if (version := getattr(tf.keras, "__version__", "2")).startswith("3"):  # tf-keras has no such attribute
        raise UserError(
            f"tf.keras is Keras {version}, expected Keras 2: install tf-keras, and set {KERAS_VARIABLE}=1 before TensorFlow is "
            "imported"
        )


def load_keras_file(path: str | Path, *, parameter: str) -> tf.keras.Model:
    """Loads an uncompiled model from a `.keras` archive of Keras 2.

    Args:
      parameter: the parameter that gave the path, for errors.

    Raises:
      UserError: the file is no such archive, Keras cannot load it, it could run code, or this is Keras 3, to which the checks do
        not apply.
    """
    check_keras()
    where = f"`{parameter}`={path}"
    if Path(path).suffix != ".keras":
        raise UserError(f"{where}: expected a SavedModel directory or a .keras file")
    try:
        config = _read_config(Path(path), where)
        _check_config(config, where)
        model = tf.keras.models.load_model(str(path), compile=False, safe_mode=True)
    except _FAILURES as error:
        raise UserError(f"{where}: Keras cannot load it: {first_line(error)}") from error
    if not isinstance(model, tf.keras.Model):
        raise UserError(f"{where}: contains a {type(model).__name__}, expected a Keras model")
    return model


def _read_config(path: Path, where: str) -> Any:
    """Reads the config of an archive.

    Raises:
      UserError: the file is not an archive of Keras 2 with weights in HDF5.
    """
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            what = "is an HDF5 file" if file.read(len(_HDF5)) == _HDF5 else "is no zip archive"
        raise UserError(
            f"{where}: {what}, expected a .keras archive; if you trust it, load it in Keras and run `model.save('NAME.keras')`"
        )
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        for name in (_CONFIG, _METADATA):
            if name in names and archive.getinfo(name).file_size > _CONFIG_LIMIT:
                raise UserError(
                    f"{where}: its {name} has {archive.getinfo(name).file_size:,} bytes, expected at most {_CONFIG_LIMIT:,}"
                )
        version = str(json.loads(archive.read(_METADATA)).get("keras_version")) if _METADATA in names else "2"
        if not version.startswith("2"):
            raise UserError(
                f"{where}: saved by Keras {version[:20]}, expected Keras 2; run `model.export('DIR')` where it was saved, and use that "
                "SavedModel"
            )
        if _PICKLES in names or _WEIGHTS not in names:
            raise UserError(
                f"{where}: contains {', '.join(sorted(names))[:200]}; expected weights in {_WEIGHTS}, as `model.save` writes them"
            )
        return json.loads(archive.read(_CONFIG))


def _check_config(config: Any, where: str) -> None:
    """Refuses classes and functions that are not on the list, anywhere in a config."""
    if isinstance(config, list):
        for value in config:
            _check_config(value, where)
    if not isinstance(config, dict):
        return
    if "class_name" in config and not _is_known(config):
        module, name = (str(config.get(key))[:100] for key in ("module", "class_name"))
        what = f"function {config.get('config')}" if name == "function" else name
        raise UserError(
            f"{where}: uses {module}.{what!s:.100}, which could run code in the file; expected only Keras's own layers; if you trust "
            "it, export it as a SavedModel"
        )
    for value in config.values():
        _check_config(value, where)


def _is_known(config: dict[str, Any]) -> bool:
    """Whether an object of a config is one of Keras, or registered in this process."""
    name, module, content = config["class_name"], config.get("module"), config.get("config")
    registered = tf.keras.utils.get_custom_objects()
    if not isinstance(name, str) or not (module is None or isinstance(module, str)):
        return False
    if name == "function":
        return isinstance(content, str) and (content in registered or _is_function(module, content))
    if name in _VALUES:
        return True
    if name in _REFUSED_LAYERS or name.startswith("__"):
        return False
    # Without a module, Keras's legacy loader uses the class name only.
    if (config.get("registered_name") if "module" in config else name) in registered:
        return True
    if name in ("TFOpLambda", "SlicingOpLambda"):
        operation = content.get("function") if isinstance(content, dict) else None
        if not isinstance(operation, str) or not _OPERATION.fullmatch(operation):
            return False
    if module is None:  # written before Keras 2.12, and still loaded
        return any(name == private for _, private in _PRIVATE) or any(
            _is_class(space, name) for space in ("", *_NAMESPACES)
        )
    if module == "tensorflow.python.ops.init_ops_v2":
        return _is_class("initializers", name)
    root, _, below = module.partition(".")
    if root not in ("keras", "tf_keras"):
        return False
    if below.startswith("src."):
        return (below.removeprefix("src."), name) in _PRIVATE
    return (below == "" or below in _NAMESPACES) and _is_class(below, name)


def _is_class(namespace: str, name: str) -> bool:
    """Whether `keras.NAMESPACE.NAME` is a public class."""
    if namespace == "":
        return name in ("Model", "Sequential")
    space: Any = tf.keras
    for part in namespace.split("."):
        space = getattr(space, part, None)
    return isinstance(getattr(space, name, None), type)


def _is_function(module: str | None, name: str) -> bool:
    """Whether the name is an activation, loss or metric of Keras."""
    if module not in (None, "builtins", *(f"keras.{part}" for part in _FUNCTION_MODULES)):
        return False
    if name in ("get", "serialize", "deserialize"):
        return False
    found = [getattr(getattr(tf.keras, part), name, None) for part in _FUNCTION_MODULES]
    return any(callable(one) and not isinstance(one, type) for one in found)
