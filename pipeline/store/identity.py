"""Identities: everything that determines a store's records, as frozen dataclasses that validate themselves.

They are stored in spec.json and manifest.json, and their digests identify existing stores: a field that is renamed or
formatted differently bumps `pipeline.store.spec.FORMAT_VERSION`. An optional field is left out of the JSON where it is None,
so that stores without it keep their digests.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

from pipeline.cli.choices import check_value_range
from pipeline.errors import UserError
from pipeline.errors.text import is_printable
from pipeline.storage.checked_json import is_whole
from pipeline.views.policies.base import ViewPolicy

MAX_EXAMPLES, MAX_BATCH_SIZE = 10**12, 65_536


def digest_of(identity: dict[str, Any]) -> str:
    """SHA-256 over an identity as JSON with sorted keys, 64 hex digits."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _present(identity: Any) -> dict[str, Any]:
    """The fields of an identity that are not None."""
    return {name: value for name, value in dataclasses.asdict(identity).items() if value is not None}


def _check_name(value: object, what: str) -> None:
    if not (isinstance(value, str) and 0 < len(value) <= 1000 and is_printable(value)):
        raise UserError(f"{what} {value!r:.100}: expected 1 to 1,000 printable characters")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetIdentity:
    """Identity of a split of a data set.

    Attributes:
      name: `NAME[/CONFIG]:VERSION`.
      split: split or slice, such as `train` or `train[:90%]`.
      num_examples: number of examples N.
      fingerprint: fingerprint of TFDS's metadata. The images are verified view by view.
      image_feature: name of the image feature; None for the one that is read by default.
    """

    name: str
    split: str
    num_examples: int
    fingerprint: str
    image_feature: str | None = None

    def __post_init__(self) -> None:
        for what in ("name", "split", "fingerprint", "image_feature"):
            if (value := getattr(self, what)) is not None or what != "image_feature":
                _check_name(value, f"data set {what}")
        if not is_whole(self.num_examples, 1, MAX_EXAMPLES):
            raise UserError(f"number of examples={self.num_examples}: expected 1 to {MAX_EXAMPLES:,}")

    def to_json(self) -> dict[str, Any]:
        """As spec and manifest hold it."""
        return _present(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherIdentity:
    """Identity of a teacher and of how it is called.

    Attributes:
      fingerprint: SHA-256 of its files.
      value_range: range of its input pixels, one of `pipeline.cli.choices.VALUE_RANGES`.
      signature: signature of a SavedModel; `keras` for a `.keras` file.
      batch_size: number of views per call.
      output: name of the output; None for the one that is used by default.
    """

    fingerprint: str
    value_range: str
    signature: str
    batch_size: int
    output: str | None = None

    def __post_init__(self) -> None:
        for what in ("fingerprint", "signature", "output"):
            if (value := getattr(self, what)) is not None or what != "output":
                _check_name(value, f"teacher {what}")
        check_value_range(self.value_range)
        if not is_whole(self.batch_size, 1, MAX_BATCH_SIZE):
            raise UserError(f"`teacher_batch_size`={self.batch_size}: expected 1 to {MAX_BATCH_SIZE:,}")

    def to_json(self) -> dict[str, Any]:
        """As the spec holds it."""
        return _present(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViewAxis:
    """Everything that determines views. Stores with the same view axis have the same view at every view index.

    Attributes:
      dataset: data set of the images.
      seed: random seed of all augmentations.
      policy: augmentation policy. Its image size counts only if boxes depend on it; see `ViewPolicy.any_size`.
    """

    dataset: DatasetIdentity
    seed: int
    policy: ViewPolicy

    def to_json(self) -> dict[str, Any]:
        """What is digested and compared."""
        return {"dataset": self.dataset.to_json(), "seed": self.seed, "policy": self.policy.axis_json()}

    def digest(self) -> str:
        """SHA-256, 64 hex digits."""
        return digest_of(self.to_json())
