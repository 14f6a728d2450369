"""Measures CPU time, memory and reads of `pipeline.verify` on a store of 64,000 shards and 66 million teacher batches.

    python -m tests.benchmarks.verify_scale                   # about ten minutes, no images, no teacher

All shards are hard links to one real file, so that hashing and reading are real and the disk usage is small. A worker
that returns the records of this file replaces images and teacher.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from pipeline.cli.main import run_command
from pipeline.cli.parser import Parser, number, positive
from pipeline.precomputing.verification import sample_batches, verify_split
from pipeline.store.layout import EVAL_DIRECTORY, VIEWS_SPLIT
from pipeline.store.metadata import SplitManifest, publish_metadata
from pipeline.store.reader import StoreReader
from pipeline.store.serialization import serialize
from pipeline.store.shards import ShardInfo, shard_name, write_shard
from pipeline.store.spec import SPEC_FILE, Spec
from pipeline.views.input import Batch
from pipeline.views.records import ViewRecords
from tests.benchmarks.scale import make_spec

_EPOCHS_SHARDS = 200  # shards per epoch
_LINKS = 60_000  # hard links per file; ext4 allows 65,000


def make_records(count: int, classes: int) -> ViewRecords:
    """Random records of `count` views."""
    random = np.random.default_rng(0)
    return ViewRecords(
        example=random.integers(0, 1 << 20, count),
        box=random.integers(0, 500, (count, 4)).astype(np.int32),
        flip=random.integers(0, 2, count) == 1,
        ratio=random.random(count).astype(np.float32),
        crop_hash=random.integers(0, 1 << 32, count).astype(np.uint32),
        source_hash=random.integers(0, 1 << 32, count).astype(np.uint32),
        stored=np.ones(count, bool),
        logits=random.normal(size=(count, classes)).astype(np.float32),
    )


def make_store(store: Path, spec: Spec, records: ViewRecords, shards: int) -> None:
    """Writes a published store of identical shards."""
    codec = spec.make_codec()
    serialized = serialize(records, codec.encode(records.logits))
    for index in range(shards):
        path = store / shard_name(VIEWS_SPLIT, index)
        if index % _LINKS == 0:
            first = path
            size, sha256 = write_shard(path, [serialized], len(serialized))
        else:
            path.hardlink_to(first)
    info = ShardInfo(records=len(serialized), bytes=size, sha256=sha256, kl=0.0, max_error=0.0)
    (store / EVAL_DIRECTORY).mkdir()
    (store / SPEC_FILE).write_text(spec.to_json())
    manifest = SplitManifest(dataset=spec.dataset, shards=(info,) * shards)
    publish_metadata(store, {VIEWS_SPLIT: manifest}, digest=spec.digest(), codec=codec)
    print(f"{shards:,} shards of {len(serialized):,} views and {size:,} bytes", flush=True)


@dataclasses.dataclass
class KnownRecords:
    """A `ShardWorker` whose crops and logits are those of the shards.

    Attributes:
      spec: Spec of the store.
      records: Records of each shard.
      pipelines: Number of started input pipelines.
    """

    spec: Spec
    records: ViewRecords
    pipelines: int = 0

    def input_of(self, split: str) -> KnownRecords:
        """The input, which is the worker itself."""
        return self

    def batches(self, starts: np.ndarray) -> Iterator[Batch]:
        """The batches that the renderer would return."""
        self.pipelines += 1
        names = {"found_crop_hash": "crop_hash", "found_source_hash": "source_hash"}
        for start in starts.tolist():
            rows = np.arange(start, start + self.spec.teacher.batch_size) % len(self.records.example)
            columns = ("example", "box", "flip", "ratio", "found_crop_hash", "found_source_hash", "logits")
            yield {name: tf.constant(getattr(self.records, names.get(name, name))[rows]) for name in columns}

    @property
    def batch_size(self) -> int:
        """Teacher batch size."""
        return self.spec.teacher.batch_size

    def run_teacher(self, batch: Batch, *, split: str) -> np.ndarray:
        """Logits float32 [B, C]."""
        del split
        return batch["logits"].numpy()


@dataclasses.dataclass
class Peak:
    """The peak resident size of this process while it is watched, in bytes."""

    peak: int = 0

    def watch(self, ended: threading.Event) -> None:
        """Samples the resident size twice per second."""
        while not ended.wait(0.5):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.peak = max(self.peak, pages * os.sysconf("SC_PAGE_SIZE"))


def measured(what: str, work: Callable[[], Any]) -> Any:
    """Prints wall time, CPU time and growth of the peak resident size of some work."""
    ended, found = threading.Event(), Peak()
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    thread = threading.Thread(target=found.watch, args=(ended,))
    thread.start()
    started, cpu = time.perf_counter(), time.process_time()
    try:
        out = work()
    finally:
        ended.set()
        thread.join()
    print(
        f"{what}: {time.perf_counter() - started:,.1f} s, {time.process_time() - cpu:,.1f} s of CPU time, "
        f"{max(found.peak - before, 0) / 1e6:,.0f} MB more than before",
        flush=True,
    )
    return out


def main(argv: list[str]) -> int:
    """Runs the benchmark."""
    parser = Parser(prog="verify_scale.py")
    parser.add_argument("--shards", type=positive, default=64_000)
    parser.add_argument("--views_per_shard", type=positive, default=65_536)
    parser.add_argument("--fraction", type=number, default=0.0001)
    flags = parser.parse_strictly(argv)
    examples = flags.views_per_shard * min(_EPOCHS_SHARDS, flags.shards)
    spec = dataclasses.replace(make_spec(examples), num_classes=2, codec="float16")
    records = make_records(flags.views_per_shard, spec.num_classes)
    opened: collections.Counter[str] = collections.Counter()

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and ".array_record-" in str(arguments[0]):
            opened[str(arguments[0])] += 1

    with tempfile.TemporaryDirectory() as scratch:
        make_store(Path(scratch), spec, records, flags.shards)
        store = measured("opening the store", lambda: StoreReader(scratch))
        worker = KnownRecords(spec, records)
        lengths = [shard.records for shard in store.views.manifest.shards]
        sample = {"batch_size": spec.teacher.batch_size, "fraction": flags.fraction, "seed": 0}
        chosen = measured(
            f"choosing {flags.fraction:.2%} of {sum(-(-n // spec.teacher.batch_size) for n in lengths):,} batches",
            lambda: sum(len(starts) for starts in sample_batches(lengths, **sample)),
        )
        sys.addaudithook(audit)
        with tqdm(total=store.views.num_records, unit=" views", desc="verify", dynamic_ncols=True) as bar:
            found = measured(
                f"verifying all shards and {chosen:,} batches",
                lambda: verify_split(worker, store.views, sample_batches(lengths, **sample), bar.update),  # type: ignore[arg-type]
            )
        print(
            f"{found.views:,} views compared, failed: {found.failed}; {worker.pipelines} input pipelines; "
            f"{len(opened):,} shards read for their checksums, at most {max(opened.values())} times each"
        )
    print(f"peak of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:,.0f} MB")
    return 0


if __name__ == "__main__":
    run_command(main)
