"""The spec: what the records of a store are a function of, and where they came from.

Identity is digested and compared; provenance is shown and never compared.
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

# Changes whenever a draw, a hash, a record or this file's identity does; CHANGELOG.md says how.
FORMAT_VERSION = 1
MAX_CLASSES = 1_000_000


class Provenance(TypedDict, total=False):
    """Where a store came from. Informational: not digested, and anything may be missing."""

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
    """The format alone, which decides what else there is to read."""

    format: int


class _Version(TypedDict):
    identity: _Stated


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts to one, with dotted keys."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        key: value
        for name, branch in tree.items()
        for key, value in flatten(branch, f"{prefix}.{name}" if prefix else name).items()
    }


def differences(here: dict[str, Any], there: dict[str, Any], *, sides: tuple[str, str]) -> list[str]:
    """Lines such as `policy.image_size: 128 here, 96 in the store`, one a field that differs."""
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
      dataset: the split that views are of.
      seed: of every draw.
      policy: how views are drawn.
      eval_crop: the evaluation crop.
      teacher: whose outputs are stored.
      num_classes: C.
      codec: name of the logits' codec.
      temperature: at which the codec's cost is measured, and the trainer's default.
      render_probe: `render_probe()` of the machine that writes.
      format: of the store.
      provenance: paths as given, versions, processor, command line.
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
            raise UserError(f"--seed={self.seed}: expected 0 to 2**63 - 1")
        if not 0 < self.temperature < 1e6:
            raise UserError(
                f"--temperature={self.temperature}: expected a number above 0 and below 1,000,000"
            )
        if not is_whole(self.num_classes, 1, MAX_CLASSES):  # memory is taken for them
            raise UserError(f"number of classes={self.num_classes}: expected 1 to {MAX_CLASSES:,}")
        scalars(self.provenance, nested=1)
        self.make_codec()

    @property
    def num_examples(self) -> int:
        """N, views an epoch."""
        return self.dataset.num_examples

    @property
    def view_axis(self) -> ViewAxis:
        """What determines the views, without the teacher."""
        return ViewAxis(dataset=self.dataset, seed=self.seed, policy=self.policy)

    def make_codec(self) -> Codec:
        """The codec of the logits."""
        return make_codec(self.codec, self.num_classes, temperature=self.temperature)

    def identity(self) -> dict[str, Any]:
        """What records are a function of, as JSON."""
        out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "provenance"}
        return {name: part.to_json() if hasattr(part, "to_json") else part for name, part in out.items()}

    def digest(self) -> str:
        """SHA-256 over the identity, 64 hex digits."""
        return digest_of(self.identity())

    def to_json(self) -> str:
        """The text of spec.json."""
        whole = {"identity": self.identity(), "digest": self.digest(), "provenance": self.provenance}
        return json.dumps(whole, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str, *, where: str) -> Spec:
        """Parses `to_json`'s text; `where` names it in errors.

        Raises:
          DataError: not a spec, of another format, or its digest is not its identity's.
        """
        try:
            tree = parse_json(text)
            if (found := build(_Version, tree)["identity"]["format"]) != FORMAT_VERSION:
                raise DataError(
                    f"{where}: store format {found}, this version reads {FORMAT_VERSION}; "
                    "install the version that wrote it or precompute again"
                )
            whole = build(_SpecFile, tree)
            spec = dataclasses.replace(whole["identity"], provenance=whole.get("provenance", {}))
        except (ValueError, TypeError) as error:
            raise DataError(f"{where}: not a store's spec ({error})") from error
        if spec.digest() != whole["digest"]:
            raise DataError(
                f"{where}: digest is {spec.digest()[:16]} for what it says, {whole['digest'][:16]} as written; the file "
                "was changed after it was made"
            )
        return spec

    @classmethod
    def load(cls, store: str | Path) -> Spec:
        """Reads a store's spec.

        Raises:
          UserError: there is no store.
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
            raise UserError(f"--store={store}: {SPEC_FILE} cannot be read: {error}") from error

    def check_same(self, stored: Spec, *, store: str) -> None:
        """Refuses to go on with a store that another spec made.

        Raises:
          DataError: lists what differs, with both sides.
        """
        if lines := differences(self.identity(), stored.identity(), sides=("asked for", f"in {store}")):
            raise DataError(
                f"--store={store} was made from another spec: {'; '.join(lines)}; ask for the same or name another "
                "--store"
            )

    def check_renderer(self) -> None:
        """Renders the built-in picture and compares.

        Raises:
          DataError: this machine's TensorFlow renders differently.
        """
        if (here := render_probe()) != self.render_probe:
            raise DataError(
                f"this machine's TensorFlow renders differently: built-in picture is {here} here, "
                f"{self.render_probe} in the spec (written on {self.provenance.get('processor', 'another machine')}, "
                f"TensorFlow {self.provenance.get('versions', {}).get('tensorflow', '?')}); use such a machine"
            )


class _SpecFile(TypedDict):
    """spec.json."""

    identity: Spec
    digest: str
    provenance: NotRequired[Provenance]
