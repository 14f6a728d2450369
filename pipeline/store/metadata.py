"""The manifest and TFDS's metadata of a directory of shards.

`dataset_info.json` alone defines what is published, and is written last.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

import tensorflow_datasets as tfds
from tensorflow_datasets.core import file_adapters, naming

from pipeline.errors import DataError
from pipeline.storage.checked_json import build, read_json
from pipeline.storage.files import atomic_file, write_text
from pipeline.store.codecs import Codec
from pipeline.store.identity import DatasetIdentity
from pipeline.store.layout import INFO_LIMIT, MANIFEST_LIMIT, VIEWS_SPLIT, split_name
from pipeline.store.serialization import record_features
from pipeline.store.shards import FILENAME_TEMPLATE, MAX_SHARDS, ShardInfo
from pipeline.store.splits import file_split

MANIFEST_FILE = "manifest.json"
INFO_FILE = "dataset_info.json"
FEATURES_FILE = "features.json"
TFDS_NAME = "teacher_views"
_LENGTH = re.compile(r"[1-9][0-9]{0,12}")


class _SplitInfo(TypedDict):
    """A split in dataset_info.json."""

    name: str
    shardLengths: list[str | int]
    filepathTemplate: str


class _InfoFile(TypedDict):
    """dataset_info.json, as TFDS writes it."""

    splits: list[_SplitInfo]


class _SplitFile(TypedDict):
    """A split in manifest.json. Other fields, such as the codec's fidelity, are informational."""

    dataset: DatasetIdentity
    shards: list[ShardInfo]


class _ManifestFile(TypedDict):
    """manifest.json."""

    spec: str
    splits: dict[str, _SplitFile]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitManifest:
    """The shards of a split, and the identity of its data set."""

    dataset: DatasetIdentity
    shards: tuple[ShardInfo, ...]

    @property
    def records(self) -> int:
        """Number of views."""
        return sum(shard.records for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Size of all shards."""
        return sum(shard.bytes for shard in self.shards)

    def fidelity(self) -> dict[str, float]:
        """Mean KL and largest logit error of the codec over all shards."""
        # Older shards may have a KL of -1e-16.
        total = sum(max(shard.kl, 0.0) * shard.records for shard in self.shards)
        return {
            "mean_kl": total / max(self.records, 1),
            "max_logit_error": max((shard.max_error for shard in self.shards), default=0.0),
        }


def published_lengths(directory: Path) -> dict[str, list[int]]:
    """Reads shard lengths by file name of the split from `dataset_info.json`; empty if nothing is published.

    Raises:
      DataError: the file is not a store's TFDS metadata.
    """
    path = directory / INFO_FILE
    if not path.exists():
        return {}
    try:
        info = build(_InfoFile, read_json(path, limit=INFO_LIMIT))
        lengths = {split_name(split["name"]): _shard_lengths(split) for split in info["splits"]}
        if len(lengths) != len(info["splits"]) or not lengths:
            raise ValueError(f"splits {[split['name'] for split in info['splits']]}")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a store's metadata ({type(error).__name__}: {error})") from error
    templates = {split["filepathTemplate"] for split in info["splits"]}
    if templates != {FILENAME_TEMPLATE}:
        raise DataError(f"{path}: file names are {sorted(templates)}, expected {FILENAME_TEMPLATE}")
    return lengths


def _shard_lengths(split: _SplitInfo) -> list[int]:
    """Number of views of each shard. TFDS writes numbers as text."""
    texts = [str(length) for length in split["shardLengths"]]
    if not 1 <= len(texts) <= MAX_SHARDS:
        raise ValueError(f"split {split['name']}: {len(texts)} shards, expected 1 to {MAX_SHARDS}")
    if wrong := [text for text in texts if not _LENGTH.fullmatch(text)]:
        raise ValueError(f"split {split['name']}: a shard of {wrong[0]!r:.50} views")
    return [int(text) for text in texts]


def load_manifest(directory: Path, *, digest: str) -> dict[str, SplitManifest]:
    """Reads the published part of the manifest, by split: `views`, or an evaluated split such as `train[800:]`.

    A run that dies between the two files leaves a manifest with more shards than `dataset_info.json`. These are not published
    and are left out.

    Raises:
      DataError: the manifest is unreadable, of another spec, or contradicts `dataset_info.json`.
    """
    lengths = published_lengths(directory)
    if not lengths:
        return {}
    path = directory / MANIFEST_FILE
    try:
        whole = build(_ManifestFile, read_json(path, limit=MANIFEST_LIMIT))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a store's manifest ({type(error).__name__}: {error})") from error
    if whole["spec"] != digest:
        raise DataError(f"{path}: belongs to spec {whole['spec'][:16]}, this store's spec is {digest[:16]}")
    splits = {
        name: SplitManifest(dataset=split["dataset"], shards=tuple(split["shards"]))
        for name, split in whole["splits"].items()
    }
    out = {}
    for name, counts in lengths.items():
        shards = splits[name].shards[: len(counts)] if name in splits else ()
        if [shard.records for shard in shards] != counts:
            raise DataError(
                f"{directory}: split {name} has {len(shards)} shards of {sum(s.records for s in shards)} views in "
                f"{MANIFEST_FILE}, {len(counts)} of {sum(counts)} in {INFO_FILE}"
            )
        split = name if name == VIEWS_SPLIT else splits[name].dataset.split
        if file_split(split) != name:
            raise DataError(
                f"{path}: split {name} is of {split}, expected the name {file_split(split)}; the file was edited"
            )
        out[split] = dataclasses.replace(splits[name], shards=shards)
    return out


def publish_metadata(
    directory: Path, splits: Mapping[str, SplitManifest], *, digest: str, codec: Codec
) -> None:
    """Writes the manifest, the features and finally `dataset_info.json`, each atomically.

    Raises:
      DataError: there are more shards than five digits can number, or published shards would change.
    """
    for name, split in splits.items():
        if len(split.shards) > MAX_SHARDS:
            raise DataError(f"split {name}: {len(split.shards)} shards, expected at most {MAX_SHARDS}")
    splits = {file_split(split): manifest for split, manifest in splits.items()}
    for name, counts in published_lengths(directory).items():
        if name not in splits or [s.records for s in splits[name].shards[: len(counts)]] != counts:
            raise DataError(f"{directory}: refuses to change published shards of split {name}")
    manifest = {
        "spec": digest,
        "splits": {
            name: {
                "dataset": split.dataset.to_json(),
                "codec": codec.name,
                "fidelity": split.fidelity(),
                "shards": [dataclasses.asdict(shard) for shard in split.shards],
            }
            for name, split in splits.items()
        },
    }
    write_text(directory / MANIFEST_FILE, json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    with tempfile.TemporaryDirectory() as scratch:
        _write_tfds_metadata(Path(scratch), directory, splits, codec)
        for file in (FEATURES_FILE, INFO_FILE):
            with atomic_file(directory / file) as temporary:
                shutil.copyfile(Path(scratch) / file, temporary)


def _write_tfds_metadata(
    scratch: Path, directory: Path, splits: Mapping[str, SplitManifest], codec: Codec
) -> None:
    """Writes TFDS metadata to a scratch directory, since TFDS does not write atomically."""
    info = tfds.core.DatasetInfo(
        builder=tfds.core.dataset_info.DatasetIdentity(
            name=TFDS_NAME,
            version=tfds.core.Version("1.0.0"),
            data_dir=str(scratch),
            module_name="",
            config_name="",
            release_notes={},
        ),
        features=record_features(codec),
        description="Augmented views and the teacher logits for them. Record index is view index.",
    )
    info.set_file_format(file_adapters.FileFormat.ARRAY_RECORD)
    split_infos = [
        tfds.core.SplitInfo(
            name=name,
            shard_lengths=[shard.records for shard in split.shards],
            num_bytes=split.bytes,
            filename_template=naming.ShardedFileTemplate(
                template=FILENAME_TEMPLATE,
                data_dir=str(directory),
                filetype_suffix="array_record",
                dataset_name=TFDS_NAME,
            ),
        )
        for name, split in splits.items()
    ]
    info.set_splits(tfds.core.splits.SplitDict(split_infos))
    info.write_to_directory(str(scratch))
