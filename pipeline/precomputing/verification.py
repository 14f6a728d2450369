"""Verification of a store: renders a sample of its views again, runs the teacher on them, and compares."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from tqdm import tqdm

from pipeline.precomputing.worker import ShardWorker, rendered_records
from pipeline.storage.cache import SHARD_CACHE_BYTES
from pipeline.store.codecs import Codec
from pipeline.store.layout import VIEWS_SPLIT
from pipeline.store.openers import DOWNLOADS
from pipeline.store.reader import SplitReader, StoreReader
from pipeline.views.input import Batch
from pipeline.views.keys import stream_key
from pipeline.views.order import permute
from pipeline.views.records import ViewRecords

_SHARDS_PER_PIPELINE = 256  # starting an input pipeline takes 0.1 to 0.35 s of CPU time
# Largest difference of float32 sums in another order, as on another processor or with another number of threads, relative to
# the largest logit of the view. On the machine that wrote the store, the difference is 0.
ARITHMETIC_TOLERANCE = np.float32(1e-4)


@dataclasses.dataclass
class Findings:
    """Counts over a sample.

    Attributes:
      views: number of compared views.
      wrong_parameters: number of views whose example, box, flip or ratio differs.
      wrong_crops: number of views whose crop or source fingerprint differs.
      wrong_logits: number of views with a logit outside of the tolerance.
      max_logit_difference: largest absolute difference between stored and new logits, both after the codec.
    """

    views: int = 0
    wrong_parameters: int = 0
    wrong_crops: int = 0
    wrong_logits: int = 0
    max_logit_difference: float = 0.0

    def add(self, other: Findings) -> None:
        """Adds the counts of another split."""
        self.views += other.views
        self.wrong_parameters += other.wrong_parameters
        self.wrong_crops += other.wrong_crops
        self.wrong_logits += other.wrong_logits
        self.max_logit_difference = max(self.max_logit_difference, other.max_logit_difference)

    @property
    def failed(self) -> bool:
        """Whether the store must not be used."""
        return bool(self.wrong_parameters or self.wrong_crops or self.wrong_logits)

    def text(self, what: str, *, codec: str) -> str:
        """One line for the terminal; `what` names the records."""
        return (
            f"{what}: {self.views:,} computed again, {self.wrong_parameters} with other parameters, "
            f"{self.wrong_crops} differing crops, largest logit difference {self.max_logit_difference:.3g} "
            f"({self.wrong_logits} views beyond the tolerance of {codec})"
        )


def verify_store(
    store: StoreReader,
    worker: ShardWorker,
    *,
    fraction: float,
    seed: int,
    capacity: int = SHARD_CACHE_BYTES,
) -> dict[str, Findings]:
    """Verifies all shards of a store, and a sample of its teacher batches.

    Args:
      worker: worker with the store's teacher and data set.
      fraction: share of the teacher batches in the sample, 0..1.
      capacity: see `verified_shards`.

    Returns:
      Findings for `views` and for `evaluation crops`.

    Raises:
      UserError: the teacher cannot be used.
      DataError: a shard is missing or damaged.
    """
    worker.try_teacher()
    findings = {"views": Findings(), "evaluation crops": Findings()}
    total = sum(reader.manifest.records for reader in store.readers())
    with tqdm(total=total, unit=" views", desc="verify", dynamic_ncols=True) as bar:
        for reader in store.readers():
            samples = sample_batches(
                [shard.records for shard in reader.manifest.shards],
                batch_size=worker.batch_size,
                fraction=fraction,
                seed=seed,
            )
            found = verify_split(worker, reader, samples, bar.update, capacity=capacity)
            findings["views" if reader.split == VIEWS_SPLIT else "evaluation crops"].add(found)
    return findings


def sample_batches(
    lengths: Sequence[int], *, batch_size: int, fraction: float, seed: int
) -> Iterator[np.ndarray]:
    """Draws a uniform sample of the teacher batches of a split.

    A keyed permutation ranks all batches, and the lowest ranks are the sample. So the number of batches is exact, and the
    sample of a shard does not depend on the other shards.

    Args:
      lengths: number of views of each shard.
      batch_size: teacher batch size.
      fraction: share of the batches, 0..1; at least one batch is sampled.

    Yields:
      First views of the sampled batches of a shard, int64 [n], ascending.
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
    """Compares the shards of a split with the manifest and yields their readers in order; prefetches the next shards.

    Args:
      capacity: largest size in bytes of downloaded shards on this machine; one shard may exceed it.

    Raises:
      DataError: a shard is missing or damaged.
    """
    count = len(reader.manifest.shards)
    fitting = capacity // max((shard.bytes for shard in reader.manifest.shards), default=1)
    parallel = max(min(DOWNLOADS, fitting), 1)
    ahead: collections.deque[concurrent.futures.Future[ArrayRecordReader]] = collections.deque()
    pool = concurrent.futures.ThreadPoolExecutor(parallel)
    try:
        for number in range(count):
            while len(ahead) < min(parallel, count - number):
                ahead.append(pool.submit(reader.opener.verify, number + len(ahead)))
            with contextlib.closing(ahead.popleft().result()) as shard:
                yield shard
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def verify_split(
    worker: ShardWorker,
    reader: SplitReader,
    samples: Iterable[np.ndarray],
    on_views: Callable[[int], None],
    *,
    capacity: int = SHARD_CACHE_BYTES,
) -> Findings:
    """Verifies the shards of a split, and computes a sample of its teacher batches again. Reads each shard once.

    Args:
      worker: worker with the store's teacher and data set.
      samples: see `sample_batches`.
      on_views: called with the number of views after each batch and shard.
      capacity: see `verified_shards`.

    Raises:
      DataError: a shard is missing or damaged.
    """
    findings, first = Findings(), 0
    to_render, samples = itertools.tee(samples)
    batches = _rendered_batches(worker, reader.split, to_render)
    opened = verified_shards(reader, capacity=capacity)
    shards = zip(reader.manifest.shards, opened, samples, strict=True)
    for number, (info, shard, starts) in enumerate(shards):
        end = first + info.records
        for start in starts.tolist():
            views = np.arange(start, min(start + worker.batch_size, end))
            batch = next(batches)
            logits = worker.run_teacher(batch, split=reader.split)[: len(views)]
            stored = reader.read_from(number, shard, views)
            compare(batch, logits, stored, findings, codec=reader.codec, first_view=start)
            on_views(len(views))
            first += len(views)
        on_views(end - first)  # views outside of the sample
        first = end
    return findings


def _rendered_batches(worker: ShardWorker, split: str, samples: Iterable[np.ndarray]) -> Iterator[Batch]:
    """Renders the sampled batches; starts one input pipeline per group of shards."""
    shards = iter(samples)
    while group := list(itertools.islice(shards, _SHARDS_PER_PIPELINE)):
        if len(starts := np.concatenate(group)):
            yield from worker.input_of(split).batches(starts)


def compare(
    batch: Batch,
    logits: np.ndarray,
    stored: ViewRecords,
    findings: Findings,
    *,
    codec: Codec,
    first_view: int,
) -> None:
    """Adds the comparison of one teacher batch to `findings`.

    Args:
      batch: batch as rendered now.
      logits: logits of its first n views as the teacher returns them now, float32 [n, C].
      stored: records of these views.
      first_view: index of the first view.
    """
    found = rendered_records(batch, logits)
    same = stored.example == found.example
    same &= (stored.box == found.box).all(axis=1) & (stored.flip == found.flip)
    same &= stored.ratio == found.ratio
    crops = (stored.crop_hash == found.crop_hash) & (stored.source_hash == found.source_hash)
    difference = np.abs(stored.logits - codec.decode(codec.encode(logits, first_view=first_view)))
    allowed = codec.allowed_difference(logits, arithmetic_tolerance(logits))
    findings.views += len(logits)
    findings.wrong_parameters += int((~same).sum())
    findings.wrong_crops += int((~crops).sum())
    findings.wrong_logits += int((difference > allowed).any(axis=1).sum())
    findings.max_logit_difference = max(findings.max_logit_difference, float(difference.max()))


def arithmetic_tolerance(logits: np.ndarray) -> np.ndarray:
    """Largest difference between the logits of two machines, before any codec: [n, C] to [n, 1]."""
    return ARITHMETIC_TOLERANCE * np.abs(logits).max(axis=1, keepdims=True)
