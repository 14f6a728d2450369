"""Summary of a store as a tree for JSON and as text, and its damaged shards. Shards are opened only for checksums."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm

from pipeline.cli.units import bytes_text, counted
from pipeline.errors import DataError
from pipeline.errors.text import printable
from pipeline.precomputing.reports import codec_error_text
from pipeline.storage.files import TEMPORARY
from pipeline.store.accuracy import SplitAccuracy, read_accuracy
from pipeline.store.layout import below
from pipeline.store.reader import SplitReader, StoreReader
from pipeline.store.shards import parse_shard_name, shard_name
from pipeline.store.splits import file_split

Contents = dict[str, Any]


def _split_contents(reader: SplitReader, accuracy: SplitAccuracy | None) -> dict[str, Any]:
    manifest = reader.manifest
    lengths = [shard.records for shard in manifest.shards]
    return {
        "name": reader.split,
        "of": manifest.dataset.split,
        "views": manifest.records,
        "shards": len(lengths),
        "longest_shard": max(lengths),
        "bytes": manifest.bytes,
        "bytes_a_view": manifest.bytes / manifest.records,
        **manifest.fidelity(),
        "teacher_top1": accuracy and accuracy.top1,
        "labeled": accuracy and accuracy.labeled,
        "unlabeled": accuracy and accuracy.unlabeled,
    }


def _unpublished(store: StoreReader) -> dict[str, int]:
    """Number and size of unpublished shard files: a run is writing them, or has died."""
    published = {file_split(reader.split): len(reader.manifest.shards) for reader in store.readers()}
    found = []
    directories = {below(reader.split): reader for reader in store.readers()}
    for reader in directories.values():
        for name, size in reader.opener.files().items():
            named = parse_shard_name(name)
            finished = named is not None and named[1] >= published.get(named[0], 0)
            if finished or (name.startswith(TEMPORARY) and ".array_record-" in name):
                found.append(size)
    return {"files": len(found), "bytes": sum(found)}


def find_contents(store: StoreReader) -> Contents:
    """Summarizes a store from its metadata alone.

    Returns:
      `store` (path or URL), `spec` (identity, provenance), `digest`, `epochs`, `views`, `shards` and `bytes` (with evaluation
      splits), `bytes_a_view`, `splits` (training views first), `unpublished` (files, bytes), and `classes` (label feature,
      numbers of names and of mapped classes). `teacher_top1` of a split is the share of correct answers on `labeled` examples,
      without the `unlabeled` ones; None if it was not measured.
    """
    accuracy = read_accuracy(store)
    splits = [_split_contents(reader, accuracy.get(reader.split)) for reader in store.readers()]
    return {
        "store": store.location,
        "digest": store.spec.digest(),
        "epochs": store.epochs,
        "views": store.views.num_records,
        "shards": sum(split["shards"] for split in splits),
        "bytes": sum(split["bytes"] for split in splits),
        "bytes_a_view": splits[0]["bytes_a_view"],
        "splits": splits,
        "unpublished": _unpublished(store),
        "classes": {
            "label_feature": store.classes.label_feature,
            "names": store.classes.names and len(store.classes.names),
            "mapped": store.classes.class_map and len(store.classes.class_map),
        },
        "spec": {"identity": store.spec.identity(), "provenance": store.spec.provenance},
    }


def find_problems(store: StoreReader, *, checksums: bool) -> list[str]:
    """One line for each published shard that does not match the manifest.

    Args:
      checksums: whether to read every shard and compare its SHA-256.
    """
    if not checksums:
        return list(store.file_problems())
    problems = []
    total = sum(reader.manifest.bytes for reader in store.readers())
    with tqdm(total=total, unit="B", unit_scale=True, desc="checksums", dynamic_ncols=True) as bar:
        for reader in store.readers():
            for number, info in enumerate(reader.manifest.shards):
                bar.set_postfix_str(shard_name(reader.split, number), refresh=False)
                try:
                    reader.verify(number)
                except DataError as error:
                    problems.append(str(error))
                bar.update(info.bytes)
    return problems


def _completeness_text(contents: Contents) -> str:
    shards = contents["shards"]
    if contents["whole"]:
        how = (
            "matches the manifest, SHA-256 compared"
            if contents["checksums"]
            else "exists with the size in the manifest; --checksums compares SHA-256"
        )
        return f"complete: each of {counted(shards, 'shard')} {how}"
    problems = contents["problems"]
    lines = [f"damaged: {len(problems):,} of {counted(shards, 'shard')} do not match the manifest"]
    lines += [f"  {problem}" for problem in problems[:10]]
    if len(problems) > 10:
        lines.append(f"  and {len(problems) - 10:,} more")
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.2%}"


def contents_text(contents: Contents) -> str:
    """The contents for the terminal."""
    identity, provenance = contents["spec"]["identity"], contents["spec"]["provenance"]
    dataset, policy, cost = identity["dataset"], identity["policy"], contents["splits"][0]
    numbers = ", ".join(f"{name} {value}" for name, value in policy.items() if name != "name")
    tensorflow = provenance.get("versions", {}).get("tensorflow")
    facts = {
        "store": f"{contents['store']}, format {identity['format']}, spec {contents['digest'][:16]}",
        "data set": f"{dataset['name']}, split {dataset['split']}: {dataset['num_examples']:,} examples",
        "teacher": f"{provenance.get('teacher')}, {identity['num_classes']:,} classes, fingerprint "
        f"{identity['teacher']['fingerprint'][:16]}",
        "views": f"{policy['name']}: {numbers}; seed {identity['seed']}",
        "command": provenance.get("command"),
        "machine": f"{provenance.get('processor')}, TensorFlow {tensorflow}",
        "coverage": f"{counted(contents['epochs'], 'epoch')}, {counted(contents['views'], 'view')}",
        "codec": codec_error_text(
            identity["codec"],
            mean_kl=cost["mean_kl"],
            max_logit_error=cost["max_logit_error"],
            temperature=identity["temperature"],
        ),
        "size": f"{bytes_text(contents['bytes'])} in {counted(contents['shards'], 'shard')}",
    }
    if recorded := [f"{name} {value}" for name, value in contents["classes"].items() if value is not None]:
        facts["classes"] = ", ".join(recorded)
    if unpublished := contents["unpublished"]["files"]:
        facts["unpublished"] = (
            f"{counted(unpublished, 'shard file')}, {bytes_text(contents['unpublished']['bytes'])}: a run is writing them or has "
            "died; the same command continues it"
        )
    lines = [f"{name:12}{printable(value)}" for name, value in facts.items()]
    return "\n".join([*lines, "", *_split_lines(contents["splits"]), "", _completeness_text(contents)])


def _split_lines(splits: list[dict[str, Any]]) -> list[str]:
    """Table of the splits, and the numbers of examples without a label."""
    width = max(12, *(len(printable(split[name])) + 2 for split in splits for name in ("name", "of")))
    lines = [
        f"{'split':{width}}{'of':{width}}{'views':>14}{'shards':>8}{'bytes':>10}{'bytes/view':>14}{'teacher top-1':>15}"
    ]
    lines += [
        f"{printable(split['name']):{width}}{printable(split['of']):{width}}{split['views']:>14,}{split['shards']:>8,}"
        f"{bytes_text(split['bytes']):>10}{split['bytes_a_view']:>14,.0f}{_percent(split['teacher_top1']):>15}"
        for split in splits
    ]
    lines += [
        f"{split['name']}: {split['unlabeled']:,} examples without a label are left out of the teacher's top-1"
        for split in splits
        if split["unlabeled"]
    ]
    return lines
