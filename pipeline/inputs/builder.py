"""TFDS builders of prepared image-classification data sets: finds and checks them, and reports how to prepare one."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import naming

from pipeline.errors import UserError
from pipeline.errors.causes import first_line
from pipeline.flags.dataset import COMMAND
from pipeline.store.spec import MAX_CLASSES

# Channels of an image feature. 0 and None: as the file has them. An alpha channel is dropped.
_CHANNELS = (None, 0, 1, 3, 4)
_CLASS_KEYS = ("pythonClassName", "python_class_name", "type")  # of features.json; the last before TFDS 4.3


def prepare_hint(name: str) -> str:
    """How to prepare a data set of TFDS."""
    return (
        f"prepare it with `tfds build {name} --file_format=array_record --data_dir=DIR` and pass "
        "`data_dir`=DIR"
    )


@contextlib.contextmanager
def quiet_tfds() -> Iterator[None]:
    """Silences TFDS's progress bars and its lines on standard output."""
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()


def find_builder(
    name: str, data_dir: str | Path | None, *, parameter: str = "dataset"
) -> tfds.core.DatasetBuilder:
    """Finds a data set that is prepared in any file format.

    Args:
      name: `NAME[/CONFIG][:VERSION]`, as TFDS takes it.
      data_dir: TFDS data directory; None for TFDS's default.
      parameter: the parameter that gave the name, for errors.

    Raises:
      UserError: TFDS does not know the name, it is not prepared there, or its features are of foreign classes.
    """
    where = str(data_dir) if data_dir else tfds.core.constants.DATA_DIR
    try:
        _check_feature_classes(Path(where), naming.parse_builder_name_kwargs(name)[0].name)
        builder = tfds.builder(name, data_dir=data_dir, try_gcs=False)
        splits = builder.info.splits
    except UserError:
        raise
    except Exception as error:  # damaged metadata make TFDS raise anything: KeyError, ParseError, ...
        raise UserError(
            f"`{parameter}`={name}: not found in {where} ({first_line(error)}); {prepare_hint(name)}; for your own images: "
            f"`{COMMAND} --folder=DIR --name=NAME --data_dir=DIR`"
        ) from error
    if not splits:
        raise UserError(f"`{parameter}`={name}: not prepared in {where}; {prepare_hint(name)}")
    return builder


def _check_feature_classes(data_dir: Path, name: str) -> None:
    """Refuses features of classes outside of TFDS: it would import the module that features.json names.

    Raises:
      UserError: the module is neither TFDS's nor imported already.
    """
    for file in [*data_dir.glob(f"{name}/*/features.json"), *data_dir.glob(f"{name}/*/*/features.json")]:
        for class_name in _feature_classes(json.loads(file.read_bytes())):
            module = class_name.rpartition(".")[0]
            if module.split(".")[0] != "tensorflow_datasets" and module not in sys.modules:
                raise UserError(
                    f"{file}: has a feature of class {class_name!r:.200}, expected classes of tensorflow_datasets; if you trust "
                    "the data set, convert it with your own script that imports the class"
                )


def _feature_classes(tree: Any) -> Iterator[str]:
    """The names of classes in the JSON of features, some of which are JSON in text themselves."""
    if isinstance(tree, dict):
        yield from (tree[key] for key in _CLASS_KEYS if isinstance(tree.get(key), str) and "." in tree[key])
        tree = list(tree.values())
    if isinstance(tree, list):
        for branch in tree:
            yield from _feature_classes(branch)
    elif isinstance(tree, str) and tree.lstrip().startswith(("{", "[")):
        with contextlib.suppress(ValueError):
            yield from _feature_classes(json.loads(tree))


def load_builder(name: str, data_dir: str | Path | None) -> tfds.core.DatasetBuilder:
    """Finds a data set that is prepared as ArrayRecord; see `find_builder`.

    Raises:
      UserError: there is none.
    """
    builder = find_builder(name, data_dir)
    file_format = builder.info.file_format
    if file_format is not None and file_format.value != "array_record":
        where = f" --from_data_dir={data_dir}" if data_dir else ""
        raise UserError(
            f"`dataset`={name}: prepared as {file_format.value} in {builder.data_dir}, expected array_record for random "
            f"access; convert it with `{COMMAND} --from_tfds={name}{where} --data_dir=DIR` and pass `data_dir`=DIR"
        )
    return builder


def image_and_label(info: tfds.core.DatasetInfo) -> tuple[str, str]:
    """Names of the image feature and the label feature: the supervised pair, or the only candidates.

    Raises:
      UserError: there is no such pair, or the features are not supported.
    """
    features, keys = info.features, info.supervised_keys
    if keys and len(keys) == 2 and all(isinstance(key, str) for key in keys):
        image, label = keys
    else:
        images = [k for k, f in features.items() if isinstance(f, tfds.features.Image)]
        labels = [k for k, f in features.items() if isinstance(f, tfds.features.ClassLabel)]
        if len(images) != 1 or len(labels) != 1:
            raise UserError(
                f"{info.full_name}: expected one image and one label feature, got images {images} and labels {labels}"
            )
        image, label = images[0], labels[0]
    if missing := [key for key in (image, label) if key not in features]:
        raise UserError(
            f"{info.full_name}: its supervised keys name feature {missing[0]!r:.100}, but it has {', '.join(features)}; "
            "prepare the data set again"
        )
    if not isinstance(features[image], tfds.features.Image) or not isinstance(
        features[label], tfds.features.ClassLabel
    ):
        raise UserError(
            f"{info.full_name}: expected an image-classification data set, got features {image}: "
            f"{type(features[image]).__name__}, {label}: {type(features[label]).__name__}"
        )
    _check_image_feature(info.full_name, image, features[image])
    _check_label_feature(info.full_name, label, features[label].num_classes or 0)
    return image, label


def _check_label_feature(name: str, key: str, num_classes: int) -> None:
    """Refuses a label feature without classes, or with so many that TFDS's list of their names fills the memory."""
    if num_classes > MAX_CLASSES:
        raise UserError(
            f"{name}: label feature {key} has {num_classes} classes, expected at most {MAX_CLASSES:,}"
        )
    if num_classes < 1:
        raise UserError(
            f"{name}: label feature {key} has no number of classes; prepare the data set again with "
            "ClassLabel(names=...) or ClassLabel(num_classes=...)"
        )


def _check_image_feature(name: str, key: str, feature: tfds.features.Image) -> None:
    """Refuses an image feature that the renderer would decode to other pixels than TFDS.

    TFDS stores float32 as the bytes of a 4-channel PNG, and uint16 in 16 bits, of which an 8-bit decoder keeps the high
    byte.
    """
    dtype, shape = np.dtype(feature.np_dtype), tuple(feature.shape)
    is_mask = isinstance(feature, tfds.features.LabeledImage)
    if dtype != np.uint8 or len(shape) != 3 or shape[2] not in _CHANNELS or is_mask:
        raise UserError(
            f"{name}: image feature {key} is {type(feature).__name__} of {dtype.name}, shape {shape}; expected Image of uint8 "
            "with shape (height, width, channels) and 1, 3, 4 or None channels, encoded as JPEG or PNG; prepare the data "
            "set again with 8-bit images"
        )
