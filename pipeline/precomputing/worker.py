"""One worker of the precompute: shard tasks to shards, on any runner or none.

A shard is a function of (spec, first view, number of views). Teacher batches are cut inside it, from its first
view, at the size that the spec records; the last one is filled up with the views that follow, whose logits are
dropped, so that every batch's composition is fixed.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from pipeline.errors import DataError, TryAgainError
from pipeline.errors.causes import of_the_system
from pipeline.inputs.dataset import Dataset
from pipeline.inputs.locate import load_teacher
from pipeline.inputs.teacher import Teacher
from pipeline.inputs.teacher_checks import check_differs, check_logits
from pipeline.precomputing.shard_sink import open_sink
from pipeline.storage.cache import DATA_CACHE_BYTES
from pipeline.store.codecs import fidelity
from pipeline.store.identity import DatasetIdentity
from pipeline.store.layout import PENDING, VIEWS_SPLIT, split_directory
from pipeline.store.shards import ShardInfo, ShardTask, serialize
from pipeline.store.spec import Spec, differences
from pipeline.views.input import Batch, ViewInput
from pipeline.views.records import EvalViews, SampledViews, ViewRecords, eval_planner
from pipeline.views.render import eval_renderer
from pipeline.views.source import ImageSource

_PROGRESS_SECONDS = 0.5
_WARM_UP_BATCHES = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrecomputeJob:
    """What a worker has to be told; small, and made of plain values, so that any runner can ship it.

    Attributes:
      store: directory of the store, or its URL.
      spec: text of spec.json.
      data_dir: TFDS data directory, its URL, or None.
      teacher: path of the teacher, or its URL.
      image_cache_bytes: for decoded images, per process.
      input_buffer_bytes: for batches that are rendered ahead, per process; a quarter of the memory by default.
      data_cache_bytes: for copies of data sets in buckets.
      lease: of a store in a bucket: the lock under which it is written.
      evaluated: data sets of the evaluated splits, as the command sees them.
      progress: directory in which progress is noted and shards for a bucket are written, on a machine that has it; by
        default progress is noted in the store.
    """

    store: str
    spec: str
    data_dir: str | None
    teacher: str
    image_cache_bytes: int
    input_buffer_bytes: int | None = None
    data_cache_bytes: int = DATA_CACHE_BYTES
    lease: str | None = None
    progress: str | None = None
    evaluated: tuple[DatasetIdentity, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardResult:
    """A finished shard and what it cost, in seconds of this worker's wall time."""

    task: ShardTask
    info: ShardInfo
    adopted: bool
    seconds: float = 0.0
    teacher_seconds: float = 0.0
    input_seconds: float = 0.0


def progress_name(task: ShardTask) -> str:
    """Name of the file in which a worker says how many views of a shard are done."""
    return f"{task.name}.progress"


def progress_path(store: str | Path, task: ShardTask) -> Path:
    """The path of that file."""
    return split_directory(store, task.split) / PENDING / progress_name(task)


@dataclasses.dataclass
class Totals:
    """Sums over a shard's batches."""

    kl: float = 0.0
    max_error: float = 0.0
    teacher_seconds: float = 0.0
    input_seconds: float = 0.0


class ShardWorker:
    """Holds teacher and data set, and computes shards.

    Args:
      job: what it works on.
      datasets: by split of the store, as far as they are open in this process; others are opened when they are needed.
      teacher: of the job, where this process has loaded it; it is loaded by default.

    Raises:
      DataError: the teacher, data set or rendering here is not the spec's.
    """

    def __init__(
        self,
        job: PrecomputeJob,
        datasets: Mapping[str, Dataset] | None = None,
        *,
        teacher: Teacher | None = None,
    ) -> None:
        self.job = job
        self.spec = Spec.from_json(job.spec, where="the job's spec")
        self.spec.check_renderer()
        self._digest = self.spec.digest()
        self._batch_size = self.spec.teacher.batch_size
        self.teacher = load_teacher(self.spec, job.teacher) if teacher is None else teacher
        self._inputs: dict[str, ViewInput] = {}
        self._datasets = dict(datasets or {})

    def _dataset(self, split: str) -> Dataset:
        """The data set of the training views, or of an evaluated split."""
        if split not in self._datasets:
            name = self.spec.dataset.split if split == VIEWS_SPLIT else split
            if self._datasets:
                self._datasets[split] = next(iter(self._datasets.values())).select(name)
            else:
                self._datasets[split] = Dataset(
                    self.spec.dataset.name,
                    name,
                    data_dir=self.job.data_dir,
                    data_cache_bytes=self.job.data_cache_bytes,
                )
        return self._datasets[split]

    @property
    def batch_size(self) -> int:
        """Of the teacher."""
        return self._batch_size

    def input_of(self, split: str) -> ViewInput:
        """Input pipeline of the training views, or of a split's evaluation crops."""
        if split not in self._inputs:
            self._inputs[split] = self._training_input() if split == VIEWS_SPLIT else self._eval_input(split)
        return self._inputs[split]

    def _training_input(self) -> ViewInput:
        spec, dataset = self.spec, self._dataset(VIEWS_SPLIT)
        _check_dataset(dataset, spec.dataset, where="in the spec")
        records = SampledViews(
            policy=spec.policy,
            seed=spec.seed,
            num_examples=spec.num_examples,
            num_classes=spec.num_classes,
        )
        source = ImageSource(dataset, spec.policy.renderer(), cache_bytes=self.job.image_cache_bytes)
        return ViewInput(records, source, self._batch_size, buffer_bytes=self.job.input_buffer_bytes)

    def _eval_input(self, split: str) -> ViewInput:
        spec, dataset = self.spec, self._dataset(split)
        for identity in self.job.evaluated:
            if identity.split == split:
                _check_dataset(dataset, identity, where="in the command")
        records = EvalViews(
            eval_crop=spec.eval_crop,
            image_size=spec.policy.image_size,
            num_examples=dataset.num_examples,
            num_classes=spec.num_classes,
        )
        source = ImageSource(dataset, eval_renderer(spec.eval_crop, spec.policy.image_size))
        return ViewInput(
            records,
            source,
            self._batch_size,
            eval_planner(self._batch_size, num_examples=dataset.num_examples),
            buffer_bytes=self.job.input_buffer_bytes,
        )

    def warm_up(self) -> float:
        """Tries the teacher on the first views' batch; seconds per batch of the teacher, compilation excluded.

        Raises:
          UserError: the teacher does not fit the views or the data set, its outputs are no logits, or they depend on
            more than a row.
          DataError: a logit is not finite.
        """
        batch = next(self.input_of(VIEWS_SPLIT).batches(np.array([0])))
        seconds = []
        for _ in range(_WARM_UP_BATCHES):
            start = time.perf_counter()
            logits = self.run_teacher(batch)
            seconds.append(time.perf_counter() - start)
        path, assumed = str(self.teacher.path), bool(self.spec.provenance.get("assume_logits"))
        self.teacher.check_rows(batch["crops"].numpy())
        check_logits(logits, path=path, assume_logits=assumed)
        return min(seconds)

    def check_differs(self) -> None:
        """Refuses a teacher whose output is the same for each view; apart, for a wrong value range has a better message.

        Raises:
          UserError: it is.
        """
        batches = list(self.input_of(VIEWS_SPLIT).batches(np.array([0, self._batch_size])))
        logits = np.concatenate([self.run_teacher(batch) for batch in batches])
        crops = np.concatenate([batch["crops"][: self._batch_size] for batch in batches])
        check_differs(logits, crops, path=str(self.teacher.path))

    def run_teacher(self, batch: Batch, *, split: str = VIEWS_SPLIT) -> np.ndarray:
        """Logits float32 [B, C] of a batch of a split of the store."""
        ratio, name_row = batch["ratio"][: self._batch_size], functools.partial(row_name, batch, split=split)
        return self.teacher.logits(batch["crops"], batch["partner"], ratio, name_row=name_row)

    def compute(self, task: ShardTask, on_views: Callable[[int], None] | None = None) -> ShardResult:
        """Writes a shard, or takes the one that an earlier run of this task finished; never in place of a repair.

        Args:
          task: the shard.
          on_views: called with the number of views of each finished batch.

        Raises:
          TryAgainError: another shard has its name, and nothing says what it is.
        """
        begun = time.perf_counter()
        job = self.job
        sink = open_sink(job.store, digest=self._digest, lease=job.lease, scratch=job.progress)
        info = None if task.sha256 else sink.finished(task)
        if info is not None:
            if on_views is not None:
                on_views(task.records)
            return ShardResult(task=task, info=info, adopted=True)
        totals = Totals()
        chunks = self._chunks(task, totals, on_views)
        try:
            size, sha256 = sink.write(task, chunks)
        except FileExistsError as error:
            # A duplicate of this task was first, on a machine that rounds otherwise; the first one stays.
            if (info := sink.finished(task)) is not None:
                return ShardResult(task=task, info=info, adopted=True)
            raise TryAgainError(
                f"{task.name}: another process has put other content there; end it if it still runs, and run the same "
                "command again"
            ) from error
        info = ShardInfo(
            records=task.records,
            bytes=size,
            sha256=sha256,
            kl=totals.kl / task.records,
            max_error=totals.max_error,
        )
        if not task.sha256:  # else it is in the metadata already
            sink.note(task, info)
        return ShardResult(
            task=task,
            info=info,
            adopted=False,
            seconds=time.perf_counter() - begun,
            teacher_seconds=totals.teacher_seconds,
            input_seconds=totals.input_seconds,
        )

    def _chunks(
        self, task: ShardTask, totals: Totals, on_views: Callable[[int], None] | None
    ) -> Iterator[list[bytes]]:
        """Serialized records of a shard, a teacher batch at a time."""
        for start, batch in self.batches(task, totals):
            count = min(self._batch_size, task.first + task.records - start)
            begun = time.perf_counter()
            logits = self.run_teacher(batch, split=task.split)[:count]
            totals.teacher_seconds += time.perf_counter() - begun
            yield encode_records(self.spec, found_records(batch, logits), totals, first_view=start)
            if on_views is not None:
                on_views(count)

    def batches(self, task: ShardTask, totals: Totals) -> Iterator[tuple[int, Batch]]:
        """(first view, batch) for each teacher batch of a shard; counts the time spent waiting for input."""
        starts = np.arange(task.first, task.first + task.records, self._batch_size)
        batches = self.input_of(task.split).batches(starts)
        for start in starts.tolist():
            begun = time.perf_counter()
            batch = next(batches)
            totals.input_seconds += time.perf_counter() - begun
            yield start, batch

    def _progress_path(self, task: ShardTask) -> Path | None:
        """Where to note progress; None on a machine that does not see the one that shows it."""
        place = self.job.progress or self.job.store
        if not Path(place).is_dir():
            return None
        path = progress_path(place, task)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def run(self, task: ShardTask) -> ShardResult:
        """`compute`, with the progress noted beside the store now and then.

        Raises:
          UserError: the disk is full, or cannot be written.
          DataError: an image cannot be decoded, a logit is not finite, or a repaired shard is another.
        """
        path = self._progress_path(task)
        done, noted = 0, 0.0

        def note(count: int) -> None:
            nonlocal done, noted
            done += count
            now = time.monotonic()
            if path is not None and (now - noted >= _PROGRESS_SECONDS or done == task.records):
                path.write_text(str(done))
                noted = now

        try:
            return self.compute(task, note)
        except OSError as error:  # which crosses process borders as text only under a name of ours
            raise (of_the_system(error) or error) from error


def _check_dataset(dataset: Dataset, expected: DatasetIdentity, *, where: str) -> None:
    """Compares a data set of this worker with the one that the store is made from.

    Raises:
      DataError: they differ; both sides are shown.
    """
    if lines := differences(dataset.identity().to_json(), expected.to_json(), sides=("here", where)):
        raise DataError(f"this worker sees another data set: {'; '.join(lines)}")


def row_name(batch: Batch, row: int, *, split: str = VIEWS_SPLIT) -> str:
    """Names a row of a batch of a split of the store, for messages."""
    view, example = int(batch["views"][row]), int(batch["example"][row])
    if split != VIEWS_SPLIT:
        return f"example {example} of {split}"
    partner = int(batch["example"][int(batch["partner"][row])])
    return f"view {view} (example {example}, mixed with example {partner})"


def encode_records(spec: Spec, records: ViewRecords, totals: Totals, *, first_view: int) -> list[bytes]:
    """A teacher batch's records, serialized; adds what the codec costs to a shard's totals.

    Args:
      spec: of the store.
      records: of consecutive views, logits as the teacher gave them.
      totals: of the shard.
      first_view: index of the first view.

    Raises:
      DataError: a logit does not fit the codec.
    """
    codec = spec.make_codec()
    encoded = codec.encode(records.logits, first_view=first_view)
    kl, error = fidelity(records.logits, codec.decode(encoded), spec.temperature)
    totals.kl += kl
    totals.max_error = max(totals.max_error, error)
    return serialize(records, encoded)


def found_records(batch: Batch, logits: np.ndarray) -> ViewRecords:
    """The records of a batch's first n views as rendered, n = len(logits), float32 [n, C]."""
    count = len(logits)
    names = ("example", "box", "flip", "ratio", "found_crop_hash", "found_source_hash")
    column = {name: batch[name][:count].numpy() for name in names}
    return ViewRecords(
        example=column["example"],
        box=column["box"],
        flip=column["flip"],
        ratio=column["ratio"],
        crop_hash=column["found_crop_hash"],
        source_hash=column["found_source_hash"],
        stored=np.zeros(count, bool),
        logits=logits,
    )
