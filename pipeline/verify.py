"""Replays a sample of a store and runs the teacher on it again: `python -m pipeline.verify --store=DIR`.

    python -m pipeline.verify --store=runs/mnist_5k/store            # 1 % of the views, seconds

Every shard's checksum is compared. Then a seeded sample of teacher batches, cut as the precompute cut them,
is drawn, rendered and run again. Exit code 0 if every parameter and crop is the same and no logit, both sides
through the codec, differs by more than the arithmetic of another machine and one step of the codec allow; 3
otherwise.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take seconds
    from pipeline.errors import run_module

    run_module("pipeline.verify", flags="pipeline.cli.verify")

import dataclasses

import numpy as np
from tqdm import tqdm

from pipeline.cli.verify import parse
from pipeline.errors import DataError
from pipeline.provenance import find_data_dir, find_teacher
from pipeline.store.layout import VIEWS_SPLIT
from pipeline.store.reader import SplitReader, Store
from pipeline.store.shards import ShardTask
from pipeline.views.keys import random_words, stream_key, unit_float64
from pipeline.worker import PrecomputeJob, ShardWorker, Totals, found_records

# float32 sums in another order: oneDNN on another processor, or another number of threads. Relative to the
# largest logit of the view; on the machine that wrote the store the difference is 0.
ARITHMETIC = np.float32(1e-4)


@dataclasses.dataclass
class Findings:
    """Counts over the sample.

    Attributes:
      views: compared.
      wrong_parameters: views whose example, box, flip or ratio differ from what is drawn now.
      wrong_crops: views whose crop or source fingerprint differs.
      wrong_logits: views with a logit that differs by more than is allowed.
      max_logit_difference: largest absolute difference between stored and fresh logits, after the codec.
    """

    views: int = 0
    wrong_parameters: int = 0
    wrong_crops: int = 0
    wrong_logits: int = 0
    max_logit_difference: float = 0.0

    @property
    def failed(self) -> bool:
        """Whether the store must not be used."""
        return bool(self.wrong_parameters or self.wrong_crops or self.wrong_logits)


def arithmetic_slack(logits: np.ndarray) -> np.ndarray:
    """How far two machines' logits of a view may be apart before any codec: [n, C] to [n, 1]."""
    return ARITHMETIC * np.abs(logits).max(axis=1, keepdims=True)


def sample_batches(reader: SplitReader, *, batch_size: int, fraction: float, seed: int) -> list[ShardTask]:
    """A seeded sample of teacher batches, as tasks of one batch each; at least one.

    Args:
      reader: of the split.
      batch_size: of the teacher.
      fraction: of the batches, 0 to 1.
      seed: of the sample.
    """
    tasks, first = [], 0
    for shard_number, shard in enumerate(reader.manifest.shards):
        for start in range(0, shard.records, batch_size):
            records = min(batch_size, shard.records - start)
            tasks.append(
                ShardTask(split=reader.split, number=shard_number, first=first + start, records=records)
            )
        first += shard.records
    words = random_words(stream_key(seed, "verify", len(tasks)), 0, len(tasks))[:, 0]
    count = max(round(fraction * len(tasks)), 1)
    return [tasks[i] for i in np.sort(np.argsort(unit_float64(words), kind="stable")[:count])]


def compare(worker: ShardWorker, reader: SplitReader, task: ShardTask, findings: Findings) -> None:
    """Adds one teacher batch's comparison to `findings`."""
    for start, batch in worker.batches(task, Totals()):
        fresh = worker.run_teacher(batch)[: task.first + task.records - start]
        found = found_records(batch, fresh)
        stored = reader.read(np.arange(start, start + len(fresh)))
        same = stored.example == found.example
        same &= (stored.box == found.box).all(axis=1) & (stored.flip == found.flip)
        same &= stored.ratio == found.ratio
        crops = (stored.crop_hash == found.crop_hash) & (stored.source_hash == found.source_hash)
        difference = np.abs(stored.logits - reader.codec.decode(reader.codec.encode(fresh, first_view=start)))
        allowed = reader.codec.allowed_difference(fresh, arithmetic_slack(fresh))
        findings.views += len(fresh)
        findings.wrong_parameters += int((~same).sum())
        findings.wrong_crops += int((~crops).sum())
        findings.wrong_logits += int((difference > allowed).any(axis=1).sum())
        findings.max_logit_difference = max(findings.max_logit_difference, float(difference.max()))


def main(argv: list[str]) -> int:
    """The command; see the module's docstring."""
    flags = parse(argv)
    store = Store(flags.store, shard_cache_bytes=flags.shard_cache_bytes, in_order=False)
    for reader in store.readers():
        for shard_number in range(len(reader.manifest.shards)):
            reader.verify(shard_number)
    job = PrecomputeJob(
        store=flags.store,
        spec=store.spec.to_json(),
        data_dir=find_data_dir(store.spec, flags.data_dir),
        teacher=find_teacher(store.spec, flags.teacher, store=flags.store),
        image_cache_bytes=0,
        data_cache_bytes=flags.data_cache_bytes,
    )
    worker = ShardWorker(job)
    batch_size = store.spec.teacher.batch_size
    tasks = [
        (reader, task)
        for reader in store.readers()
        for task in sample_batches(reader, batch_size=batch_size, fraction=flags.fraction, seed=flags.seed)
    ]
    findings = {False: Findings(), True: Findings()}
    with tqdm(
        total=sum(t.records for _, t in tasks), unit=" views", desc="verify", dynamic_ncols=True
    ) as bar:
        for reader, task in tasks:
            compare(worker, reader, task, findings[task.split != VIEWS_SPLIT])
            bar.update(task.records)
    for is_eval, found in findings.items():
        print(
            f"{'evaluation crops' if is_eval else 'views'}: {found.views:,} run again, "
            f"{found.wrong_parameters} with other parameters, {found.wrong_crops} differing crops, "
            f"largest logit difference {found.max_logit_difference:.3g} "
            f"({found.wrong_logits} views beyond what {store.spec.codec} allows)"
        )
    if any(found.failed for found in findings.values()):
        raise DataError(
            f"{flags.store}: the store is not what its spec's teacher gives for its views; do not train on it"
        )
    return 0
