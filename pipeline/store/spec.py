"""The store spec: everything that determines a store's records (identity), and their provenance.

The identity has a digest and is compared. The provenance is informational.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from pipeline.errors import DataError, UserError
from pipeline.storage.checked_json import build, is_whole, parse_json, read_text, scalars
from pipeline.store.codecs import Codec, make_codec
from pipeline.store.identity import DatasetIdentity, TeacherIdentity, ViewAxis, digest_of
from pipeline.store.layout import SPEC_FILE, SPEC_LIMIT, missing_store
from pipeline.views.eval_crop import EvalCrop
from pipeline.views.policies import policy_from_json
from pipeline.views.policies.base import ViewPolicy
from pipeline.views.render import render_probe

# Bumped by any change of a draw, a hash, a record or the identity; see CHANGELOG.md.
FORMAT_VERSION = 1
MAX_CLASSES = 1_000_000


class Provenance(TypedDict, total=False):
    """Provenance of a store. Informational: not in the digest, and every field may be missing."""

    command: str | None
    directory: str | None
    data_dir: str | None
    teacher: str | None
    embedded_default: bool | None
    recipe: str | None
    versions: dict[str, str]
    processor: str | None
    assume_logits: bool | None


class _Stated(TypedDict):
    """The format version, which is read before the other fields."""

    format: int


class _Version(TypedDict):
    identity: _Stated


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Flattens nested dicts to one dict with dotted keys."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        key: value
        for name, branch in tree.items()
        for key, value in flatten(branch, f"{prefix}.{name}" if prefix else name).items()
    }


def differences(here: dict[str, Any], there: dict[str, Any], *, sides: tuple[str, str]) -> list[str]:
    """Describes each differing field, such as `policy.image_size: 128 here, 96 in the store`."""
    left, right = flatten(here), flatten(there)
    absent = "absent"
    return [
        f"{key}: {left.get(key, absent)} {sides[0]}, {right.get(key, absent)} {sides[1]}"
        for key in sorted(left | right)
        if left.get(key, absent) != right.get(key, absent)
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """Identity and provenance of a store.

    Attributes:
      dataset: identity of the augmented split.
      seed: random seed of all augmentations.
      policy: augmentation policy.
      eval_crop: evaluation crop.
      teacher: identity of the teacher.
      num_classes: number of classes C of the teacher.
      codec: name of the logits' codec.
      temperature: temperature at which the codec's error is measured; the default in training.
      render_probe: `render_probe()` on the machine that writes the store.
      format: format version.
      provenance: paths as given, versions, processor, command line.

    Raises:
      UserError: a field is out of range.
    """

    dataset: DatasetIdentity
    seed: int
    policy: ViewPolicy = dataclasses.field(metadata={"build": policy_from_json})
    eval_crop: EvalCrop
    teacher: TeacherIdentity
    num_classes: int
    codec: str
    temperature: float
    render_probe: str
    format: int = FORMAT_VERSION
    provenance: Provenance = dataclasses.field(
        default_factory=Provenance, compare=False, metadata={"json": False}
    )

    def __post_init__(self) -> None:
        if not is_whole(self.seed, 0, 2**63 - 1):
            raise UserError(f"`seed`={self.seed}: expected 0 to 2**63 - 1")
        if not 0 < self.temperature < 1e6:
            raise UserError(
                f"`temperature`={self.temperature}: expected a number above 0 and below 1,000,000"
            )
        if not is_whole(self.num_classes, 1, MAX_CLASSES):  # since it determines the memory
            raise UserError(f"`num_classes`={self.num_classes}: expected 1 to {MAX_CLASSES:,}")
        scalars(self.provenance, nested=1)
        self.make_codec()

    @property
    def num_examples(self) -> int:
        """Number of examples N, which is the number of views per epoch."""
        return self.dataset.num_examples

    @property
    def view_axis(self) -> ViewAxis:
        """The view axis, which does not depend on the teacher."""
        return ViewAxis(dataset=self.dataset, seed=self.seed, policy=self.policy)

    def make_codec(self) -> Codec:
        """The codec of the logits."""
        return make_codec(self.codec, self.num_classes, temperature=self.temperature)

    def identity(self) -> dict[str, Any]:
        """The identity as JSON."""
        out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "provenance"}
        return {name: part.to_json() if hasattr(part, "to_json") else part for name, part in out.items()}

    def digest(self) -> str:
        """SHA-256 of the identity, 64 hex digits."""
        return digest_of(self.identity())

    def to_json(self) -> str:
        """The content of spec.json."""
        whole = {"identity": self.identity(), "digest": self.digest(), "provenance": self.provenance}
        return json.dumps(whole, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str, *, where: str) -> Spec:
        """Parses the content of spec.json.

        Args:
          text: content of the file.
          where: name of the file, for errors.

        Raises:
          DataError: the text is not a spec, has another format version, or its digest does not match.
        """
        try:
            tree = parse_json(text)
            if (found := build(_Version, tree)["identity"]["format"]) != FORMAT_VERSION:
                raise DataError(
                    f"{where}: store format is {found}, this version reads {FORMAT_VERSION}; "
                    "install the version that wrote the store, or precompute again"
                )
            whole = build(_SpecFile, tree)
            spec = dataclasses.replace(whole["identity"], provenance=whole.get("provenance", {}))
        except (ValueError, TypeError) as error:
            raise DataError(f"{where}: not a store's spec ({error})") from error
        if spec.digest() != whole["digest"]:
            raise DataError(
                f"{where}: digest of its content is {spec.digest()[:16]}, but {whole['digest'][:16]} is written in it; the file was "
                "edited: restore it from a copy"
            )
        return spec

    @classmethod
    def load(cls, store: str | Path) -> Spec:
        """Reads a store's spec.

        Raises:
          UserError: there is no store, or its spec cannot be read.
          DataError: see `from_json`.
        """
        path = Path(store) / SPEC_FILE
        try:
            return cls.from_json(read_text(path, limit=SPEC_LIMIT), where=str(path))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise missing_store(store) from error
        except ValueError as error:
            raise DataError(f"{path}: not a store's spec ({error})") from error
        except OSError as error:
            raise UserError(f"`store`={store}: cannot read {SPEC_FILE}: {error}") from error

    def check_same(self, stored: Spec, *, store: str) -> None:
        """Checks that a store was made from this spec.

        Raises:
          DataError: lists the differing fields with both values.
        """
        if lines := differences(self.identity(), stored.identity(), sides=("asked for", f"in {store}")):
            raise DataError(
                f"`store`={store} was made from another spec: {'; '.join(lines)}; use the same values, or another `store`"
            )

    def check_renderer(self) -> None:
        """Checks the render probe on this machine.

        Raises:
          DataError: TensorFlow renders differently on this machine.
        """
        if (here := render_probe()) != self.render_probe:
            raise DataError(
                f"TensorFlow on this machine renders differently: render probe is {here} here, {self.render_probe} in the spec (written "
                f"on {self.provenance.get('processor', 'an unknown processor')} with TensorFlow "
                f"{self.provenance.get('versions', {}).get('tensorflow', '?')}); use the same kind of machine and version"
            )


class _SpecFile(TypedDict):
    """spec.json."""

    identity: Spec
    digest: str
    provenance: NotRequired[Provenance]
