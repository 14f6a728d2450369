"""Golden values of two small stores and two short runs, made by the commands from the files in `tests/golden`.

A store outlives the code that wrote it: a later version must draw, render, store and replay the same. The values below may change
only together with `FORMAT_VERSION` of the spec (views, records, digests, file names) or with a recipe (losses); CHANGELOG.md says
so then, and `python -m tests.test_golden` writes them anew. Keys may be added to result.json and metrics.jsonl. The files of
`tests/golden` are never made again: encoders and SavedModels differ from version to version.

Processors round the outputs of teacher and student differently, so these have a tolerance; everything else is exact.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from array_record.python.array_record_module import ArrayRecordReader

from pipeline import dataset, precompute
from pipeline.store.reader import StoreReader
from trainer import train

GOLDEN = Path(__file__).with_name("golden")
VALUES = GOLDEN / "values.json"
# A code of the int8 store is up to 0.05 wide. Losses without oneDNN, which sums in another order, differ by 1e-5 of their value.
LOGIT_TOLERANCE, LOSS_TOLERANCE = 0.06, 1e-3
# Columns that depend on no teacher.
EXACT = ("example", "box", "flip", "mixup_ratio", "crop_hash", "source_hash")

PRECOMPUTE = ["--runner=FnApiRunner", "--dataset=golden_images", f"--teacher={GOLDEN / 'teacher'}"]
PRECOMPUTE += ["--image_size=24", "--teacher_batch_size=4", "--views_per_shard=14", "--epochs=3"]
STORES = {
    "inception": ["--policy=inception", "--mixup_fold", "--mixup_block=4", "--codec=int8", "--seed=7"]
    + ["--temperature=2", "--eval_splits=test"],
    "light": ["--policy=light", "--codec=topk:2", "--temperature=10", "--eval_splits=none"],
}
TRAIN = [
    "--student=tiny",
    "--batch_size=5",
    "--steps=6",
    "--warmup_steps=2",
    "--log_every=1",
    "--eval_every=3",
]
TRAIN += ["--weight_decay=0.1"]  # so much that six steps show it
RUNS = {
    "inception": ["--learning_rate=0.01"],  # big_vision's loss, clip and decay
    "light": ["--recipe=keras_example", "--allow_recipe_mismatch"],
}


def exact_digest(shard: Path) -> str:
    """SHA-256 of the columns `EXACT` of a shard's records."""
    reader, digest = ArrayRecordReader(str(shard)), hashlib.sha256()
    for record in reader.read_all():
        example = tf.train.Example.FromString(record)
        for name in set(example.features.feature) - set(EXACT):
            del example.features.feature[name]
        digest.update(example.SerializeToString(deterministic=True))
    reader.close()
    return digest.hexdigest()


def keys(tree: Any, prefix: str = "") -> set[str]:
    """Dotted keys of nested objects; of a list, those of all its items."""
    if isinstance(tree, list):
        return set().union(*(keys(item, f"{prefix}[]") for item in tree))
    if not isinstance(tree, dict):
        return {prefix}
    return set().union(*(keys(value, f"{prefix}.{name}".strip(".")) for name, value in tree.items()))


def observe_store(path: Path) -> dict[str, Any]:
    """What is compared of a store."""
    store = StoreReader(path)
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and not file.name.startswith(".")]
    names = {str(file.relative_to(path)): file for file in files}
    shards = {name: file for name, file in names.items() if ".array_record-" in name}
    metadata = {name: file for name, file in names.items() if name.endswith(("manifest.json", "_info.json"))}
    return {
        "spec": store.spec.digest(),
        "view_axis": store.spec.view_axis.digest(),
        "files": list(names),
        "records": {name: exact_digest(file) for name, file in shards.items()},
        "features": hashlib.sha256(names["features.json"].read_bytes()).hexdigest(),
        "keys": {name: sorted(keys(json.loads(file.read_text()))) for name, file in metadata.items()},
        "logits": {
            reader.split: reader.read(np.arange(5)).logits.round(4).tolist() for reader in store.readers()
        },
    }


def observe_run(workdir: Path) -> dict[str, Any]:
    """What is compared of a run."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["kind"] == "train"]
    evaluated = [line for line in lines if line["kind"] != "train"]
    result = json.loads((workdir / "result.json").read_text())
    return {
        "views": [line["views_digest"] for line in trained],
        "keys": {"result.json": sorted(keys(result)), "metrics.jsonl": sorted(keys(lines))},
        "learning_rate": [line["learning_rate"] for line in trained],
        "losses": [line["loss"] for line in trained],
        "evaluated_losses": [line["distillation_loss"] for line in evaluated],
    }


def observe(root: Path) -> dict[str, dict[str, Any]]:
    """Runs the commands in a directory; what is compared of each store and run, by name."""
    out = {}
    data = f"--data_dir={root / 'data'}"
    dataset.main(["import", f"--folder={GOLDEN / 'images'}", "--name=golden_images", data])
    for name, flags in STORES.items():
        store, workdir = root / name / "store", root / name / "run"
        precompute.main([*PRECOMPUTE, data, f"--store={store}", *flags])
        train.main([f"--store={store}", f"--workdir={workdir}", *TRAIN, *RUNS[name]])
        out[name] = observe_store(store) | {"run": observe_run(workdir)}
    return out


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return observe(tmp_path_factory.mktemp("golden"))


@pytest.fixture(scope="module")
def golden() -> dict[str, dict[str, Any]]:
    return json.loads(VALUES.read_text())


@pytest.mark.parametrize("name", STORES)
@pytest.mark.parametrize("part", ["spec", "view_axis", "files", "records", "features", "keys"])
def test_a_store_is_the_same(name: str, part: str, observed: Any, golden: Any) -> None:
    assert observed[name][part] == golden[name][part]


@pytest.mark.parametrize("name", STORES)
def test_stored_logits_are_the_same(name: str, observed: Any, golden: Any) -> None:
    ours, theirs = observed[name]["logits"], golden[name]["logits"]
    assert ours.keys() == theirs.keys()
    for split in theirs:
        np.testing.assert_allclose(ours[split], theirs[split], atol=LOGIT_TOLERANCE)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_the_same(name: str, observed: Any, golden: Any) -> None:
    ours, theirs = observed[name]["run"], golden[name]["run"]
    assert ours["views"] == theirs["views"]
    for part in ("learning_rate", "losses", "evaluated_losses"):
        np.testing.assert_allclose(ours[part], theirs[part], rtol=LOSS_TOLERANCE, err_msg=part)
    for file, names in theirs["keys"].items():
        assert set(names) <= set(ours["keys"][file]), file


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        VALUES.write_text(json.dumps(observe(Path(temporary)), indent=1, sort_keys=True) + "\n")
