"""Verifies a store against its data set and its teacher: `python -m pipeline.verify --store=DIR`.

    python -m pipeline.verify --store=runs/mnist_5k/store            # 1 % of the views, seconds

Reads every shard once and compares its checksum. Renders a sample of the teacher batches again, cut as the precompute cuts
them, and runs the teacher on them. The sample has `--fraction` of the batches of each split, at least one. Every batch is
equally likely, and the sample depends only on `--seed`. Exit code 0 if all parameters and crops are the same, and all logits
agree within the tolerance of another machine's arithmetic and one step of the codec; 3 otherwise.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take seconds
    from pipeline.cli.main import run_module

    run_module("pipeline.verify", flags="pipeline.flags.verify")

from pipeline.errors import DataError
from pipeline.flags.verify import parse
from pipeline.inputs.locate import find_data_dir, find_teacher
from pipeline.precomputing.verification import verify_store
from pipeline.precomputing.worker import PrecomputeJob, ShardWorker
from pipeline.store.reader import StoreReader


def main(argv: list[str]) -> int:
    """Runs the command; see the module docstring."""
    flags = parse(argv)
    store = StoreReader(flags.store, shard_cache_bytes=flags.shard_cache_bytes, in_order=False)
    job = PrecomputeJob(
        store=flags.store,
        spec=store.spec.to_json(),
        data_dir=find_data_dir(store.spec, flags.data_dir),
        teacher=find_teacher(store.spec, flags.teacher, store=flags.store),
        image_cache_bytes=0,
        data_cache_bytes=flags.data_cache_bytes,
        eval_datasets=tuple(store.eval_reader(split).manifest.dataset for split in store.eval_splits),
    )
    findings = verify_store(
        store, ShardWorker(job), fraction=flags.fraction, seed=flags.seed, capacity=flags.shard_cache_bytes
    )
    for what, found in findings.items():
        print(found.text(what, codec=store.spec.codec))
    if any(found.failed for found in findings.values()):
        raise DataError(
            f"{flags.store}: the records are not what the spec's teacher and data set give; do not train on this store"
        )
    print(f"verified: {flags.store}: the records are what the spec's teacher and data set give")
    return 0
