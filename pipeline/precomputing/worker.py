"""A precompute worker: computes the shards of tasks, on any Beam runner or without Beam.

A shard is a function of (spec, first view, number of views). Teacher batches are cut inside the shard, from its first
view, at the batch size in the spec. The last batch is padded with the views that follow, and their logits are dropped, so
that every batch has a fixed composition.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Mapping

import numpy as np

from pipeline.cli.choices import NO_LABELS
from pipeline.errors import DataError
from pipeline.errors.causes import system_error
from pipeline.inputs.dataset import Dataset
from pipeline.inputs.locate import load_teacher
from pipeline.inputs.teacher import Teacher
from pipeline.inputs.teacher_checks import check_differs, check_logits
from pipeline.precomputing.progress import ProgressNote
from pipeline.precomputing.shard_sink import open_sink
from pipeline.storage.cache import DATA_CACHE_BYTES
from pipeline.store.identity import DatasetIdentity
from pipeline.store.layout import VIEWS_SPLIT
from pipeline.store.shards import ShardInfo, ShardTask
from pipeline.store.spec import Spec, differences
from pipeline.views.input import Batch, ViewInput
from pipeline.views.records import EvalViews, SampledViews, ViewRecords, eval_planner
from pipeline.views.render import eval_renderer
from pipeline.views.source import ImageSource

_TIMED_BATCHES = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrecomputeJob:
    """Everything that a worker needs; small and picklable, so that any runner can ship it.

    Attributes:
      store: path or URL of the store.
      spec: text of spec.json.
      data_dir: path or URL of the TFDS data directory, or None.
      teacher: path or URL of the teacher.
      image_cache_bytes: memory for decoded images, per process.
      input_buffer_bytes: memory for batches that are rendered ahead, per process; a quarter of the memory by default.
      data_cache_bytes: disk space for copies of data sets from buckets.
      lease: lease of the lock of a store in a bucket.
      progress: local directory for progress notes and for shards on their way to a bucket, if the worker's machine has it;
        the store by default.
      eval_datasets: identities of the evaluated splits, for comparison with what the worker opens.
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
    eval_datasets: tuple[DatasetIdentity, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardResult:
    """A finished shard and its cost in seconds of this worker's wall time.

    Attributes:
      task: shard task.
      info: manifest entry.
      adopted: whether the shard was finished by another attempt.
      seconds: total time.
      teacher_seconds: time in the teacher.
      input_seconds: time spent waiting for crops.
    """

    task: ShardTask
    info: ShardInfo
    adopted: bool = False
    seconds: float = 0.0
    teacher_seconds: float = 0.0
    input_seconds: float = 0.0


class _Stopwatch:
    """Sums the wall time of the contexts that it is entered for."""

    seconds = 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._start


class ShardWorker:
    """Holds the teacher and the data sets of a job, and computes shards.

    Args:
      datasets: open data sets by split of the store; others are opened when they are needed.
      teacher: the loaded teacher; loaded from the job by default.

    Raises:
      DataError: teacher or renderer differ from the spec's.
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
        self.teacher = load_teacher(self.spec, job.teacher) if teacher is None else teacher
        self._inputs: dict[str, ViewInput] = {}
        self._datasets = dict(datasets or {})

    @property
    def batch_size(self) -> int:
        """Teacher batch size."""
        return self.spec.teacher.batch_size

    def run(self, task: ShardTask) -> ShardResult:
        """Computes a shard, or adopts the one that another attempt of this task finished.

        Progress is noted beside the store.

        Raises:
          TryAgainError: another process has written a different shard under this name, or has taken the store over.
          UserError: the disk is full or not writable.
          DataError: an image cannot be decoded, a logit is not finite, or a repaired shard differs from the published one.
        """
        job, size = self.job, self.batch_size
        whole, teacher, crops = _Stopwatch(), _Stopwatch(), _Stopwatch()
        sink = open_sink(job.store, self.spec, lease=job.lease, scratch=job.progress)
        progress = ProgressNote(job.progress or job.store, task)
        if not task.sha256 and (info := sink.finished(task)) is not None:
            progress.add(task.records)
            return ShardResult(task=task, info=info, adopted=True)
        starts = np.arange(task.first, task.first + task.records, size)
        try:
            with whole, sink.open(task) as shard:
                batches = self.input_of(task.split).batches(starts)
                for start in starts.tolist():
                    count = min(size, task.first + task.records - start)
                    with crops:
                        batch = next(batches)
                    with teacher:
                        logits = self.run_teacher(batch, split=task.split)
                    shard.write(rendered_records(batch, logits[:count]))
                    progress.add(count)
        except OSError as error:  # only our own exceptions cross process borders as more than text
            raise (system_error(error) or error) from error
        return ShardResult(
            task=task,
            info=shard.info,
            adopted=shard.adopted,
            seconds=whole.seconds,
            teacher_seconds=teacher.seconds,
            input_seconds=crops.seconds,
        )

    def run_teacher(self, batch: Batch, *, split: str = VIEWS_SPLIT) -> np.ndarray:
        """Logits float32 [B, C] of a batch of a split of the store."""
        ratio, name_row = batch["ratio"][: self.batch_size], functools.partial(row_name, batch, split=split)
        return self.teacher.logits(batch["crops"], batch["partner"], ratio, name_row=name_row)

    def try_teacher(self) -> float:
        """Checks the teacher on the first batch of views; returns its seconds per batch, without compilation.

        Raises:
          UserError: the teacher does not fit the views or the data set, its outputs are not logits, or they depend on more
            than one row.
          DataError: a logit is not finite.
        """
        batch = next(self.input_of(VIEWS_SPLIT).batches(np.array([0])))
        seconds = []
        for _ in range(_TIMED_BATCHES):
            start = time.perf_counter()
            logits = self.run_teacher(batch)
            seconds.append(time.perf_counter() - start)
        self.teacher.check_rows(batch["crops"].numpy())
        assumed = bool(self.spec.provenance.get("assume_logits"))
        check_logits(logits, what=self.teacher.what, assume_logits=assumed)
        return min(seconds)

    def check_differs(self) -> None:
        """Refuses a teacher with the same output for every view. Call it after the value range is checked.

        Raises:
          UserError: the outputs are the same.
        """
        batches = list(self.input_of(VIEWS_SPLIT).batches(np.array([0, self.batch_size])))
        logits = np.concatenate([self.run_teacher(batch) for batch in batches])
        crops = np.concatenate([batch["crops"][: self.batch_size] for batch in batches])
        check_differs(logits, crops, what=self.teacher.what)

    def input_of(self, split: str) -> ViewInput:
        """Input pipeline of the training views, or of the evaluation crops of a split.

        Raises:
          DataError: this worker opens another data set than the job's.
        """
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
        return ViewInput(records, source, self.batch_size, buffer_bytes=self.job.input_buffer_bytes)

    def _eval_input(self, split: str) -> ViewInput:
        spec, dataset = self.spec, self._dataset(split)
        for identity in self.job.eval_datasets:
            if identity.split == split:
                _check_dataset(dataset, identity, where="in the job")
        records = EvalViews(
            eval_crop=spec.eval_crop,
            image_size=spec.policy.image_size,
            num_examples=dataset.num_examples,
            num_classes=spec.num_classes,
        )
        source = ImageSource(dataset, eval_renderer(spec.eval_crop, spec.policy.image_size))
        planner = eval_planner(self.batch_size, num_examples=dataset.num_examples)
        return ViewInput(records, source, self.batch_size, planner, buffer_bytes=self.job.input_buffer_bytes)

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
                    image_feature=self.spec.dataset.image_feature,
                    label_feature=NO_LABELS,
                )
        return self._datasets[split]


def _check_dataset(dataset: Dataset, expected: DatasetIdentity, *, where: str) -> None:
    """Compares a data set that this worker has opened with the expected one.

    Raises:
      DataError: they differ; both sides are shown.
    """
    if lines := differences(dataset.identity().to_json(), expected.to_json(), sides=("here", where)):
        raise DataError(f"this worker sees another data set: {'; '.join(lines)}")


def row_name(batch: Batch, row: int, *, split: str = VIEWS_SPLIT) -> str:
    """Name of a row of a batch of a split of the store, for messages."""
    view, example = int(batch["views"][row]), int(batch["example"][row])
    if split != VIEWS_SPLIT:
        return f"example {example} of {split}"
    partner = int(batch["example"][int(batch["partner"][row])])
    return f"view {view} (example {example}, mixed with example {partner})"


def rendered_records(batch: Batch, logits: np.ndarray) -> ViewRecords:
    """Records of the first n views of a batch, with the fingerprints of the rendered crops.

    Args:
      batch: a batch of `ViewInput`.
      logits: float32 [n, C].
    """
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
