"""Replays a sample of a store and runs the teacher on it again: `python -m pipeline.verify --store=DIR`.

    python -m pipeline.verify --store=runs/mnist_5k/store            # 1 % of the views, seconds

Every shard is read once: its checksum is compared, and of its teacher batches, cut as the precompute cut them,
a sample is drawn, rendered and run again. The sample has `--fraction` of each split's batches, at least one; every
batch is equally likely, and which ones they are depends on `--seed` alone. Exit code 0 if every parameter and crop is the same and no logit, both sides
through the codec, differs by more than the arithmetic of another machine and one step of the codec allow; 3
otherwise.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take seconds
    from pipeline.cli.main import run_module

    run_module("pipeline.verify", flags="pipeline.flags.verify")

import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from tqdm import tqdm

from pipeline.errors import DataError
from pipeline.flags.verify import parse
from pipeline.inputs.locate import find_data_dir, find_teacher
from pipeline.precomputing.worker import PrecomputeJob, ShardWorker, found_records
from pipeline.storage.cache import SHARD_CACHE_BYTES
from pipeline.store.codecs import Codec
from pipeline.store.layout import VIEWS_SPLIT
from pipeline.store.openers import DOWNLOADS
from pipeline.store.reader import SplitReader, Store
from pipeline.views.input import Batch
from pipeline.views.keys import stream_key
from pipeline.views.order import permute
from pipeline.views.records import ViewRecords

_SHARDS_PER_PIPELINE = 256  # to start one takes 0.1 to 0.35 s of CPU time
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

    def add(self, other: Findings) -> None:
        """Adds another split's."""
        self.views += other.views
        self.wrong_parameters += other.wrong_parameters
        self.wrong_crops += other.wrong_crops
        self.wrong_logits += other.wrong_logits
        self.max_logit_difference = max(self.max_logit_difference, other.max_logit_difference)

    @property
    def failed(self) -> bool:
        """Whether the store must not be used."""
        return bool(self.wrong_parameters or self.wrong_crops or self.wrong_logits)


def arithmetic_slack(logits: np.ndarray) -> np.ndarray:
    """How far two machines' logits of a view may be apart before any codec: [n, C] to [n, 1]."""
    return ARITHMETIC * np.abs(logits).max(axis=1, keepdims=True)


def sample_batches(
    lengths: Sequence[int], *, batch_size: int, fraction: float, seed: int
) -> Iterator[np.ndarray]:
    """A seeded, uniform sample of a split's teacher batches: for each shard, the first views of those in it.

    A keyed permutation ranks all batches, and the lowest ranks are the sample: the number of batches is exact, and a shard
    is decided without looking at the others.

    Args:
      lengths: views per shard.
      batch_size: of the teacher.
      fraction: of the batches, 0 to 1; at least one batch is sampled.
      seed: of the sample.

    Yields:
      int64 [n], ascending, once per shard.
    """
    total = sum(-(-length // batch_size) for length in lengths)
    count = max(round(fraction * total), 1)
    key = stream_key(seed, "verify", total)
    first_view = first_batch = 0
    for length in lengths:
        starts = np.arange(first_view, first_view + length, batch_size)
        ranks = permute(np.arange(first_batch, first_batch + len(starts)), size=total, key=key)
        yield starts[ranks < count]
        first_view, first_batch = first_view + length, first_batch + len(starts)


def verified_shards(reader: SplitReader, *, capacity: int) -> Iterator[ArrayRecordReader]:
    """Readers of a split's shards in order, each compared with the manifest; the next few are read ahead.

    Args:
      reader: of the split.
      capacity: bytes that shards of a bucket may have on this machine at a time, though always one shard.

    Raises:
      DataError: a shard is missing or damaged.
    """
    count = len(reader.manifest.shards)
    fitting = capacity // max((shard.bytes for shard in reader.manifest.shards), default=1)
    at_once = max(min(DOWNLOADS, fitting), 1)
    ahead: collections.deque[concurrent.futures.Future[ArrayRecordReader]] = collections.deque()
    pool = concurrent.futures.ThreadPoolExecutor(at_once)
    try:
        for number in range(count):
            while len(ahead) < min(at_once, count - number):
                ahead.append(pool.submit(reader.opener.verify, number + len(ahead)))
            with contextlib.closing(ahead.popleft().result()) as shard:
                yield shard
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def compare(
    batch: Batch, fresh: np.ndarray, stored: ViewRecords, findings: Findings, *, codec: Codec, first_view: int
) -> None:
    """Adds one teacher batch's comparison to `findings`.

    Args:
      batch: as rendered now.
      fresh: logits of its first n views, float32 [n, C], as the teacher gives them now.
      stored: records of these views.
      findings: of the split.
      codec: of the store.
      first_view: index of the first view.
    """
    found = found_records(batch, fresh)
    same = stored.example == found.example
    same &= (stored.box == found.box).all(axis=1) & (stored.flip == found.flip)
    same &= stored.ratio == found.ratio
    crops = (stored.crop_hash == found.crop_hash) & (stored.source_hash == found.source_hash)
    difference = np.abs(stored.logits - codec.decode(codec.encode(fresh, first_view=first_view)))
    allowed = codec.allowed_difference(fresh, arithmetic_slack(fresh))
    findings.views += len(fresh)
    findings.wrong_parameters += int((~same).sum())
    findings.wrong_crops += int((~crops).sum())
    findings.wrong_logits += int((difference > allowed).any(axis=1).sum())
    findings.max_logit_difference = max(findings.max_logit_difference, float(difference.max()))


def _rendered(worker: ShardWorker, split: str, samples: Iterable[np.ndarray]) -> Iterator[Batch]:
    """The batches of `sample_batches`, rendered; an input pipeline is started for many shards at a time."""
    shards = iter(samples)
    while group := list(itertools.islice(shards, _SHARDS_PER_PIPELINE)):
        if len(starts := np.concatenate(group)):
            yield from worker.input_of(split).batches(starts)


def verify_split(
    worker: ShardWorker,
    reader: SplitReader,
    samples: Iterable[np.ndarray],
    on_views: Callable[[int], None],
    *,
    capacity: int = SHARD_CACHE_BYTES,
) -> Findings:
    """Verifies a split's shards, and runs a sample of its teacher batches again; each shard is read once.

    Args:
      worker: with the store's teacher and data set.
      reader: of the split.
      samples: of `sample_batches`.
      on_views: called with numbers of views that are done.
      capacity: see `verified_shards`.

    Raises:
      DataError: a shard is missing or damaged.
    """
    findings, first = Findings(), 0
    to_render, samples = itertools.tee(samples)
    batches = _rendered(worker, reader.split, to_render)
    opened = verified_shards(reader, capacity=capacity)
    shards = zip(reader.manifest.shards, opened, samples, strict=True)
    for number, (info, shard, starts) in enumerate(shards):
        end = first + info.records
        for start in starts.tolist():
            views = np.arange(start, min(start + worker.spec.teacher.batch_size, end))
            batch = next(batches)
            fresh = worker.run_teacher(batch, split=reader.split)[: len(views)]
            stored = reader.read_from(number, shard, views)
            compare(batch, fresh, stored, findings, codec=reader.codec, first_view=start)
            on_views(len(views))
            first += len(views)
        on_views(end - first)  # those that are not in the sample
        first = end
    return findings


def main(argv: list[str]) -> int:
    """The command; see the module's docstring."""
    flags = parse(argv)
    store = Store(flags.store, shard_cache_bytes=flags.shard_cache_bytes, in_order=False)
    job = PrecomputeJob(
        store=flags.store,
        spec=store.spec.to_json(),
        data_dir=find_data_dir(store.spec, flags.data_dir),
        teacher=find_teacher(store.spec, flags.teacher, store=flags.store),
        image_cache_bytes=0,
        data_cache_bytes=flags.data_cache_bytes,
        evaluated=tuple(store.eval_reader(split).manifest.dataset for split in store.eval_splits),
    )
    worker = ShardWorker(job)
    worker.warm_up()  # the teacher's views among other views than in the precompute
    findings = {False: Findings(), True: Findings()}
    total = sum(reader.manifest.records for reader in store.readers())
    with tqdm(total=total, unit=" views", desc="verify", dynamic_ncols=True) as bar:
        for reader in store.readers():
            samples = sample_batches(
                [shard.records for shard in reader.manifest.shards],
                batch_size=store.spec.teacher.batch_size,
                fraction=flags.fraction,
                seed=flags.seed,
            )
            found = verify_split(worker, reader, samples, bar.update, capacity=flags.shard_cache_bytes)
            findings[reader.split != VIEWS_SPLIT].add(found)
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
