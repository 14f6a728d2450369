"""Finds again what a store was made from: the paths given, else the ones in its provenance.

What is found is only a candidate: data set and teacher are compared with the spec's fingerprints afterwards.
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
from pipeline.store.reader import Store
from pipeline.store.spec import Spec, differences


def _candidates(spec: Spec, path: str) -> list[str]:
    """Where a path of the provenance may be: where the precompute ran, or, if all has moved together, here."""
    directory = spec.provenance.get("directory")
    if directory is None or is_url(path):
        return [path]
    return list(dict.fromkeys([str(Path(directory, path)), path]))


def find_data_dir(spec: Spec, given: str | None) -> str | None:
    """The TFDS data directory: as given, the embedded default's, or the one that the precompute used.

    Raises:
      UserError: the embedded default's data set is not in the directory given, or the precompute's is not there.
    """
    if spec.provenance.get("embedded_default"):
        if given is not None and not is_url(given) and not Path(given, embedded.DATASET).is_dir():
            raise UserError(
                f"--data_dir={given}: no {embedded.DATASET} there, which is the embedded default's and is made here when "
                "it is needed; leave --data_dir out"
            )
        return str(embedded.prepare_dataset()) if given is None else given
    path = spec.provenance.get("data_dir")
    if given is not None or path is None:
        return given
    for candidate in _candidates(spec, path):
        if is_url(candidate) or _is_there(candidate, Path.is_dir):
            return candidate
    raise UserError(
        f"--data_dir is missing: the store was made with {_candidates(spec, path)[0]}, which is not on this machine"
    )


def select_split(store: Store, split: str, opened: Dataset) -> Dataset:
    """The data set of one of a store's evaluation splits, of the data set that is open already; compared.

    Raises:
      UserError: the data set has no such split.
      DataError: it is not the one that the teacher saw.
    """
    dataset = opened.select(split)
    store.check_dataset(dataset.identity(), split=split)
    return dataset


def open_dataset(
    store: Store, split: str, *, data_dir: str | None, data_cache_bytes: int = DATA_CACHE_BYTES
) -> Dataset:
    """The data set of a store's views (`split="views"`) or of one of its evaluation splits, compared.

    Raises:
      UserError: it is not prepared there.
      DataError: it is not the one that the teacher saw.
    """
    stored = store.spec.dataset
    name = stored.split if split == "views" else split
    found = find_data_dir(store.spec, data_dir)
    dataset = Dataset(stored.name, name, data_dir=found, data_cache_bytes=data_cache_bytes)
    store.check_dataset(dataset.identity(), split=split)
    return dataset


def find_teacher(spec: Spec, given: str | None, *, store: str) -> str:
    """Path of the teacher: as given, the embedded default's, or where the precompute found it.

    Args:
      spec: of the store.
      given: as asked for.
      store: its location. A teacher in it may have come with it, and a SavedModel is code; one in a bucket that the
        store names may be anybody's.

    Raises:
      UserError: none of them is there, or it is in the store or in a bucket.
    """
    if given is not None:
        return given
    if spec.provenance.get("embedded_default"):
        return str(embedded.prepare_teacher())
    candidates = _candidates(spec, str(spec.provenance.get("teacher")))
    for candidate in candidates:
        if _is_inside(candidate, store):
            raise UserError(
                f"--teacher is missing: the store names {candidate}, inside of itself; a teacher is code that is run: pass "
                "--teacher with its path if you trust where it came from"
            )
        if is_url(candidate):
            raise UserError(
                f"--teacher is missing: the store names {candidate}; a teacher is code that is run, and that bucket may be "
                f"anybody's: pass --teacher={candidate} if you trust it"
            )
        if _is_there(candidate):
            return candidate
    raise UserError(
        f"--teacher is missing: the store was made with {candidates[0]}, which is not on this machine"
    )


def check_teacher_exists(path: str) -> None:
    """Refuses a path where nothing is, before it is needed; what a URL leads to is seen when it is.

    Raises:
      UserError: there is nothing.
    """
    if not is_url(path) and not Path(path).exists():
        raise UserError(f"--teacher={path}: no such file or directory")


def _is_there(candidate: str, look: Callable[[Path], bool] = Path.exists) -> bool:
    """Whether a path of the provenance exists here; one that cannot be a path on this machine does not."""
    try:
        return look(Path(candidate))
    except (OSError, ValueError):  # too long a name, or no text of the file system's encoding
        return False


def _is_inside(candidate: str, store: str) -> bool:
    if is_url(store) or is_url(candidate):
        return f"{candidate.rstrip('/')}/".startswith(f"{store.rstrip('/')}/")
    return _is_there(candidate, lambda path: path.resolve().is_relative_to(Path(store).resolve()))


def load_teacher(spec: Spec, path: str) -> Teacher:
    """Compares the fingerprint of a spec's teacher, and then loads it: no code of another one runs.

    Raises:
      UserError: it cannot be loaded.
      DataError: it is another teacher.
    """
    place = local_teacher(path)
    found = dataclasses.replace(spec.teacher, fingerprint=fingerprint(place))
    if lines := differences(found.to_json(), spec.teacher.to_json(), sides=("here", "in the spec")):
        made_with = spec.provenance.get("teacher", "another")
        raise DataError(
            f"--teacher={path} is not the spec's teacher: {'; '.join(lines)}; pass the one that the store was made with, "
            f"{made_with}"
        )
    return Teacher(
        place,
        image_size=spec.policy.image_size,
        num_classes=spec.num_classes,
        value_range=spec.teacher.value_range,
        signature=spec.teacher.signature,
        batch_size=spec.teacher.batch_size,
    )
