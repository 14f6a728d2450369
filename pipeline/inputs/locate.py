"""Locates the data set and the teacher of a store: at the given paths, or at those in its provenance.

A located path is only a candidate: its fingerprint is compared with the spec's afterwards.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from pipeline.errors import DataError, UserError
from pipeline.inputs import embedded
from pipeline.inputs.dataset import Dataset
from pipeline.inputs.teacher import Teacher, fingerprint, local_teacher
from pipeline.storage.bucket import is_url
from pipeline.storage.cache import DATA_CACHE_BYTES
from pipeline.store.spec import Spec, differences
from pipeline.store.view_store import ViewStore


def _candidates(spec: Spec, path: str) -> list[str]:
    """Possible places of a path in the provenance: relative to the precompute's directory, and to the current one."""
    directory = spec.provenance.get("directory")
    if directory is None or is_url(path):
        return [path]
    return list(dict.fromkeys([str(Path(directory, path)), path]))


def find_data_dir(spec: Spec, given: str | None) -> str | None:
    """Finds the TFDS data directory: the given one, the embedded default's, or the precompute's.

    Raises:
      UserError: the given directory does not have the embedded default's data set, or the precompute's directory does not
        exist here.
    """
    if spec.provenance.get("embedded_default"):
        if given is not None and not is_url(given) and not Path(given, embedded.DATASET).is_dir():
            raise UserError(
                f"`data_dir`={given}: does not have {embedded.DATASET}, the embedded default, which is made when it is needed; leave "
                "`data_dir` out"
            )
        return str(embedded.prepare_dataset()) if given is None else given
    path = spec.provenance.get("data_dir")
    if given is not None or path is None:
        return given
    for candidate in _candidates(spec, path):
        if is_url(candidate) or _is_there(candidate, Path.is_dir):
            return candidate
    raise UserError(
        f"`data_dir` is missing: the store was made with {_candidates(spec, path)[0]}, which does not exist on this machine"
    )


def select_split(store: ViewStore, split: str, opened: Dataset) -> Dataset:
    """Selects an evaluation split of an open data set, and verifies its identity.

    Raises:
      UserError: the data set has no such split.
      DataError: the split differs from the one in the store.
    """
    dataset = opened.select(split)
    store.check_dataset(dataset.identity(), split=split)
    return dataset


def open_dataset(
    store: ViewStore, split: str, *, data_dir: str | None, data_cache_bytes: int = DATA_CACHE_BYTES
) -> Dataset:
    """Opens the data set of a store's views (`split="views"`) or of an evaluation split, and verifies its identity.

    Raises:
      UserError: the data set is not prepared there.
      DataError: the data set differs from the one in the store.
    """
    stored = store.spec.dataset
    name = stored.split if split == "views" else split
    found = find_data_dir(store.spec, data_dir)
    dataset = Dataset(
        stored.name,
        name,
        data_dir=found,
        data_cache_bytes=data_cache_bytes,
        image_feature=stored.image_feature,
        label_feature=store.classes.label_feature,
    )
    store.check_dataset(dataset.identity(), split=split)
    return dataset


def find_teacher(spec: Spec, given: str | None, *, store: str) -> str:
    """Finds the path of the teacher: the given one, the embedded default's, or the precompute's.

    A SavedModel is code. So a path from the provenance must not be inside the store, which may come from elsewhere, nor in
    a bucket, which may be anyone's.

    Args:
      given: path from the user; None to look for one.

    Raises:
      UserError: the precompute's teacher does not exist here, or is inside the store or in a bucket.
    """
    if given is not None:
        return given
    if spec.provenance.get("embedded_default"):
        return str(embedded.prepare_teacher())
    if (named := spec.provenance.get("teacher")) is None:
        raise UserError(
            f"`teacher` is missing: {store} does not name it; pass the teacher that the store was made with"
        )
    candidates = _candidates(spec, named)
    for candidate in candidates:
        if _is_inside(candidate, store):
            raise UserError(
                f"`teacher` is missing: the store names {candidate} inside itself, and a teacher is code; if you trust its source, pass "
                f"`teacher`={candidate}"
            )
        if is_url(candidate):
            raise UserError(
                f"`teacher` is missing: the store names {candidate} in a bucket, and a teacher is code; if you trust its source, pass "
                f"`teacher`={candidate}"
            )
        if _is_there(candidate):
            return candidate
    raise UserError(
        f"`teacher` is missing: the store was made with {candidates[0]}, which does not exist on this machine"
    )


def check_teacher_exists(path: str) -> None:
    """Checks early that a path on this machine exists. A URL is checked when it is read.

    Raises:
      UserError: the path does not exist.
    """
    if not is_url(path) and not Path(path).exists():
        raise UserError(f"`teacher`={path}: no such file or directory")


def _is_there(candidate: str, look: Callable[[Path], bool] = Path.exists) -> bool:
    """Whether a path from the provenance exists here. It may be no valid path on this machine."""
    try:
        return look(Path(candidate))
    except (OSError, ValueError):  # too long, or not in the file system's encoding
        return False


def _is_inside(candidate: str, store: str) -> bool:
    if is_url(store) or is_url(candidate):
        return f"{candidate.rstrip('/')}/".startswith(f"{store.rstrip('/')}/")
    return _is_there(candidate, lambda path: path.resolve().is_relative_to(Path(store).resolve()))


def load_teacher(spec: Spec, path: str) -> Teacher:
    """Verifies the teacher's fingerprint, then loads it, so that no code of another teacher runs.

    Raises:
      UserError: the teacher cannot be loaded.
      DataError: it is another teacher than the spec's.
    """
    place = local_teacher(path)
    found = dataclasses.replace(spec.teacher, fingerprint=fingerprint(place))
    if lines := differences(found.to_json(), spec.teacher.to_json(), sides=("here", "in the spec")):
        made_with = spec.provenance.get("teacher", "another")
        raise DataError(
            f"`teacher`={path} is not the spec's teacher: {'; '.join(lines)}; pass the store's teacher, {made_with}"
        )
    return Teacher(
        place,
        image_size=spec.policy.image_size,
        num_classes=spec.num_classes,
        value_range=spec.teacher.value_range,
        signature=spec.teacher.signature,
        output=spec.teacher.output,
        batch_size=spec.teacher.batch_size,
    )
