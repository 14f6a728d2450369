"""TFDS builders of prepared image-classification data sets: finds and checks them, and reports how to prepare one."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import naming

from pipeline.cli.choices import NO_LABELS
from pipeline.errors import UserError
from pipeline.errors.causes import first_line
from pipeline.flags.prepared import IMPORT, check_prepared, prepare_hint
from pipeline.store.spec import MAX_CLASSES

# Channels of an image feature. 0 and None: as the file has them. An alpha channel is dropped.
_CHANNELS = (None, 0, 1, 3, 4)
_CLASS_KEYS = ("pythonClassName", "python_class_name", "type")  # of features.json; the last before TFDS 4.3


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
    check_prepared(name, data_dir, parameter=parameter)
    try:
        _check_feature_classes(Path(where), naming.parse_builder_name_kwargs(name)[0].name)
        builder = tfds.builder(name, data_dir=data_dir, try_gcs=False)
        splits = builder.info.splits
    except UserError:
        raise
    except Exception as error:  # damaged metadata make TFDS raise anything: KeyError, ParseError, ...
        raise UserError(
            f"`{parameter}`={name}: not found in {where} ({first_line(error)}); {prepare_hint(name)}"
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
            f"access; convert it with `{IMPORT} --from_tfds={name}{where} --data_dir=DIR` and pass `data_dir`=DIR"
        )
    return builder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Features:
    """The features of a data set that are read.

    Attributes:
      image: name of the image feature.
      label: name of the label feature; None for a data set without labels.
      named_image: `image` if it is not the one that is read by default, else None.
    """

    image: str
    label: str | None
    named_image: str | None


def find_features(
    info: tfds.core.DatasetInfo, *, image: str | None = None, label: str | None = None
) -> Features:
    """Finds the image feature and the label feature: those named, or the supervised pair, or the only candidates.

    Args:
      info: metadata of the data set.
      image: name of the image feature; None for the default.
      label: name of the label feature, or `none`; None for the default. A data set without a `ClassLabel` has no labels.

    Raises:
      UserError: there is no such feature, there are several candidates, or the features are not supported.
    """
    for key in info.supervised_keys or ():
        if isinstance(key, str) and key not in info.features:
            raise UserError(
                f"{info.full_name}: its supervised keys name feature {key!r:.100}, but it has {', '.join(sorted(info.features))}; "
                "prepare the data set again"
            )
    image_key = _choose(info, tfds.features.Image, image, position=0, parameter="image_feature")
    if image_key is None:
        kinds = ", ".join(
            f"{name}: {type(feature).__name__}" for name, feature in sorted(info.features.items())
        )
        raise UserError(f"{info.full_name}: expected an Image feature, got {kinds}; use a data set of images")
    label_key = None
    if label != NO_LABELS:
        label_key = _choose(info, tfds.features.ClassLabel, label, position=1, parameter="label_feature")
    _check_image_feature(info.full_name, image_key, info.features[image_key])
    if label_key is not None:
        _check_label_feature(info.full_name, label_key, info.features[label_key].num_classes or 0)
    default = _default(info, tfds.features.Image, position=0)
    return Features(image=image_key, label=label_key, named_image=None if image_key == default else image_key)


def check_features(info: tfds.core.DatasetInfo) -> None:
    """Refuses a data set without an image feature that can be read; which one is read is chosen later.

    Raises:
      UserError: there is none, or it is not supported.
    """
    images, labels = _names(info, tfds.features.Image), _names(info, tfds.features.ClassLabel)
    find_features(
        info,
        image=_default(info, tfds.features.Image, position=0) or next(iter(images), None),
        label=_default(info, tfds.features.ClassLabel, position=1) or next(iter(labels), None),
    )


def _names(info: tfds.core.DatasetInfo, kind: type) -> list[str]:
    # Sorted: the order in features.json is lost in protobuf's hash table.
    return sorted(name for name, feature in info.features.items() if isinstance(feature, kind))


def _default(info: tfds.core.DatasetInfo, kind: type, *, position: int) -> str | None:
    """The feature of a kind in the supervised pair, or the only one; None if there is none, or several."""
    names, keys = _names(info, kind), info.supervised_keys or ()
    if len(keys) == 2 and keys[position] in names:
        return str(keys[position])
    return names[0] if len(names) == 1 else None


def _choose(
    info: tfds.core.DatasetInfo, kind: type, named: str | None, *, position: int, parameter: str
) -> str | None:
    """The feature that is named, or the default; None if there is no feature of the kind.

    Raises:
      UserError: there is no such feature, or none is named and there are several.
    """
    names = _names(info, kind)
    listed = f"{info.full_name} has {kind.__name__} features {', '.join(names) or 'none'}"
    if named is not None and named not in names:
        raise UserError(f"`{parameter}`={named}: {listed}; name one of them")
    if named is None and (default := _default(info, kind, position=position)) is not None:
        return default
    if named is None and names:
        raise UserError(f"{listed}; choose one, such as `{parameter}`={names[0]}")
    return named


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
