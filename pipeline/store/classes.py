"""The teacher's classes and the labels they are compared with, as `classes.json` of a store records them.

No record depends on the file: it says what the outputs are called, and how accuracy is measured. A later command may replace
it. A store without it has the labels that its data set has by default.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TypedDict

from pipeline.cli.choices import check_class_name
from pipeline.errors import DataError, UserError
from pipeline.storage.checked_json import Count, build, read_json
from pipeline.store.layout import CLASSES_FILE, CLASSES_LIMIT
from pipeline.store.spec import Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classes:
    """What a store says about classes and labels.

    Attributes:
      label_feature: name of the label feature, or `none`; None for the data set's default.
      names: name of each of the teacher's C classes; None if they are not known.
      class_map: pairs of a teacher class and its class of the data set, by teacher class; None without a map.

    Raises:
      UserError: a name is empty, too long or not printable, or a teacher class occurs twice.
    """

    label_feature: str | None = None
    names: tuple[str, ...] | None = None
    class_map: tuple[tuple[Count, Count], ...] | None = None

    def __post_init__(self) -> None:
        for name in (*(self.names or ()), *([] if self.label_feature is None else [self.label_feature])):
            check_class_name(name)
        teacher_classes = [pair[0] for pair in self.class_map or ()]
        if self.class_map is not None and not teacher_classes:
            raise UserError("a class map without classes")
        if teacher_classes != sorted(set(teacher_classes)):
            raise UserError("a class map with teacher classes that are not ascending")

    def misfit(self, num_classes: int) -> str | None:
        """How names or map do not fit a teacher of C classes; None if they do."""
        if self.names is not None and len(self.names) != num_classes:
            return f"{len(self.names):,} class names for {num_classes:,} classes of the teacher"
        if self.class_map is not None and (last := self.class_map[-1][0]) >= num_classes:
            return f"a class map with teacher class {last:,} of {num_classes:,}"
        return None


class _File(TypedDict):
    spec: str
    classes: Classes


def read_classes(store: Path, spec: Spec) -> Classes:
    """What a store records; the defaults if it records nothing.

    Args:
      store: directory of the store's metadata.
      spec: spec of the store.

    Raises:
      DataError: the file is damaged or belongs to another store.
    """
    path = store / CLASSES_FILE
    try:
        found = build(_File, read_json(path, limit=CLASSES_LIMIT))
        if (misfit := found["classes"].misfit(spec.num_classes)) is not None:
            raise ValueError(misfit)
    except FileNotFoundError:
        return Classes()
    except (OSError, ValueError, UserError) as error:
        raise DataError(
            f"{path}: damaged ({error}); restore it from a copy, or remove it and run the precompute again with its --class_names, "
            "--class_map and --label_feature"
        ) from error
    if found["spec"] != spec.digest():
        raise DataError(
            f"{path}: belongs to spec {found['spec'][:16]!a}, this store's spec is {spec.digest()[:16]}; remove it"
        )
    return found["classes"]


def classes_json(classes: Classes, spec: Spec) -> str:
    """Text of `classes.json`."""
    fields = {name: value for name, value in dataclasses.asdict(classes).items() if value is not None}
    return json.dumps({"spec": spec.digest(), "classes": fields}, sort_keys=True, ensure_ascii=False) + "\n"
