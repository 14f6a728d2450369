"""`--write_back`: appends the online teacher's logits to the store, so that the next student can replay them.

The shards are byte-equal to those of the precompute: the teacher runs in batches of the same size (`online_teacher.BatchedTeacher`), the
logits of a view do not depend on the other rows of the batch, and the precompute's own functions write records, chunks and
files. The result is as if `pipeline.precompute` had been run for a few more epochs each time. Before the first step,
`check_machine` runs the teacher on the last stored views again and compares the logits with the store.

Only whole epochs are published: shards first, `dataset_info.json` last. A shard is kept in memory, serialized, until it is full.
It takes `--views_per_shard` views, each with 2 bytes per class in float16 and about 20 bytes more. A shard has as many whole
epochs as fit; an epoch longer than a shard takes several shards, which are published with the last one.

- At the end of a run and after SIGTERM, the whole epochs of the unfinished shard are published as a shorter shard. A last epoch
  that lacks only the views that do not fill a batch is completed.
- A crash loses the unfinished shard. The run continues from a checkpoint that may be past those views, so the teacher runs on
  them again at the start. That is less than a shard, because finished shards are on disk and adopted after verification.
  Spilling rows to disk at each checkpoint would save those minutes, but need a second format for unpublished rows.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import tensorflow as tf

from pipeline.cli.units import counted
from pipeline.errors import DataError, Interrupted, UserError
from pipeline.inputs.teacher import Teacher
from pipeline.precomputing.publishing import publish_results
from pipeline.precomputing.shard_sink import RecordEncoder
from pipeline.precomputing.shard_tasks import cut_shards
from pipeline.precomputing.store_session import remove_notes
from pipeline.precomputing.verification import ARITHMETIC_TOLERANCE, arithmetic_tolerance
from pipeline.precomputing.worker import ShardResult, rendered_records, row_name
from pipeline.storage.bucket import is_url
from pipeline.storage.cache import SHARD_CACHE_BYTES
from pipeline.storage.files import remove_temporaries
from pipeline.storage.lock import writer_lock
from pipeline.store.combination import combine, open_stores
from pipeline.store.layout import VIEWS_SPLIT
from pipeline.store.reader import StoreReader
from pipeline.store.shards import ShardInfo, ShardTask, adopt_shard, write_note, write_shard
from pipeline.store.spec import Spec
from pipeline.store.view_store import ViewStore
from pipeline.views.input import ViewInput
from pipeline.views.records import ViewRecords
from trainer.run.following import wait_for_store
from trainer.run.preemption import Preemption

RECORD = "record"  # columns of the views' records, in a batch without logits, in a step's outputs with them


class WriteBack:
    """Appends records to a store. The caller holds the lock of the store.

    Attributes:
      next_view: first view whose logits are missing.
      adding: True while `add` runs, and after an exception in it.

    Raises:
      UserError: the store is full.
    """

    def __init__(self, store: StoreReader, *, views_per_shard: int) -> None:
        self._store, self._spec = store, store.spec
        self._digest = store.spec.digest()
        self._batch_size = store.spec.teacher.batch_size
        self._views_per_shard = views_per_shard
        self._lengths = [shard.records for shard in store.views.manifest.shards]
        self._published_before = sum(self._lengths)
        self.adding = False
        remove_temporaries(store.path)
        self._plan()
        while (info := adopt_shard(store.path, self._task, digest=self._digest)) is not None:
            self._finished(self._task, info)
        self.next_view = self._task.first

    @property
    def published_epochs(self) -> int:
        """Number of epochs that were published here."""
        num_examples = self._spec.num_examples
        return sum(self._lengths) // num_examples - self._published_before // num_examples

    def _plan(self) -> None:
        """Plans the shards that are published together next."""
        end, num_examples = sum(self._lengths), self._spec.num_examples
        epochs = max(self._views_per_shard // num_examples, 1)
        tasks = cut_shards(
            VIEWS_SPLIT,
            published=self._lengths,
            total=(end // num_examples + epochs) * num_examples,
            views_per_shard=self._views_per_shard,
        )
        self._tasks = collections.deque(tasks)
        self._results: list[ShardResult] = []
        self._begin()

    def _begin(self) -> None:
        """Starts an empty shard."""
        self._task = self._tasks[0]
        self._encoder = RecordEncoder(self._spec)
        self._serialized: list[bytes] = []
        self._waiting: ViewRecords | None = None  # fewer than a teacher batch
        # Number of views of this shard up to the end of its last whole epoch, and their encoder.
        self._whole_epochs = (0, self._encoder)

    def add(self, first_view: int, records: ViewRecords) -> None:
        """Adds the records of consecutive views, with the teacher's logits before the codec.

        Args:
          first_view: index of the first view; at most `next_view`.
          records: records of the views; those before `next_view` are ignored.

        Raises:
          DataError: a logit does not fit the codec.
          UserError: the disk is full.
        """
        if first_view > self.next_view:
            raise ValueError(f"views {self.next_view}..{first_view - 1} are missing")
        count = len(records.example)
        rows = np.arange(min(self.next_view - first_view, count), count)
        self.adding = True
        while len(rows):
            room = self._task.first + self._task.records - self.next_view
            taken, rows = rows[:room], rows[room:]
            self.next_view += len(taken)
            self._append(records.take(taken))
        self.adding = False

    def _append(self, records: ViewRecords) -> None:
        waiting = records if self._waiting is None else _joined(self._waiting, records)
        done, count = 0, len(waiting.example)
        while True:
            left = self._task.records - len(self._serialized)
            size = min(self._batch_size, left)
            if size == 0 or count - done < size:
                break
            self._encode(waiting.take(np.arange(done, done + size)))
            done += size
        self._waiting = waiting.take(np.arange(done, count))
        if len(self._serialized) == self._task.records:
            self._write(self._task, self._serialized, self._encoder)

    def _encode(self, chunk: ViewRecords) -> None:
        """Encodes one teacher batch, with the batches and sums of the precompute."""
        first = self._task.first + len(self._serialized)
        epoch_end = (first + len(chunk.example)) // self._spec.num_examples * self._spec.num_examples
        if epoch_end > first:
            encoder = copy.copy(self._encoder)
            encoder.encode(chunk.take(np.arange(epoch_end - first)), first_view=first)
            self._whole_epochs = (epoch_end - self._task.first, encoder)
        self._serialized += self._encoder.encode(chunk, first_view=first)

    def _write(self, task: ShardTask, serialized: list[bytes], encoder: RecordEncoder) -> None:
        path = self._store.path
        # An interrupted run may have left another shard at this number, which is not published.
        size, sha256 = write_shard(path / task.name, [serialized], task.records, replace=True)
        info = encoder.info(records=task.records, size=size, sha256=sha256)
        write_note(path, task, info, digest=self._digest)
        self._finished(task, info)

    def _finished(self, task: ShardTask, info: ShardInfo) -> None:
        self._results.append(ShardResult(task=task, info=info, adopted=False))
        self._tasks.popleft()
        if self._tasks:
            self._begin()
        else:
            self._publish()

    def _publish(self) -> None:
        identities = {VIEWS_SPLIT: self._spec.dataset}
        publish_results(self._store.path, self._spec, results=self._results, identities=identities)
        remove_notes(self._store.path)
        self._lengths += [result.info.records for result in self._results]
        self._plan()

    def close(self) -> None:
        """Publishes the whole epochs of the unfinished shard; later views are dropped."""
        num_examples = self._spec.num_examples
        encoded = self._task.first + len(self._serialized)
        end = self.next_view // num_examples * num_examples
        if len(self._tasks) > 1 or self._results or end <= self._task.first:
            return  # an epoch of several shards is incomplete; the next run adopts the finished ones
        if self._waiting is not None and end > encoded:
            self._encode(self._waiting.take(np.arange(end - encoded)))
        count, encoder = self._whole_epochs
        task = dataclasses.replace(self._task, records=count)
        self._tasks = collections.deque([task])
        self._write(task, self._serialized[:count], encoder)
        self.next_view = self._task.first


def _joined(first: ViewRecords, second: ViewRecords) -> ViewRecords:
    columns = dataclasses.fields(ViewRecords)
    return ViewRecords(
        **{c.name: np.concatenate([getattr(first, c.name), getattr(second, c.name)]) for c in columns}
    )


@dataclasses.dataclass(frozen=True)
class TeacherPass:
    """Runs the teacher outside of training, in the same way as the precompute.

    Attributes:
      view_input: input pipeline with the teacher's batch size.
    """

    view_input: ViewInput
    teacher: Teacher

    def records(self, first: int, stop: int) -> Iterator[tuple[int, ViewRecords]]:
        """Yields (first view, records) per teacher batch of the views `first .. stop - 1`."""
        size = self.view_input.batch_size
        starts = np.arange(first, stop, size)
        for start, batch in zip(starts.tolist(), self.view_input.batches(starts), strict=True):
            ratio, name_row = batch["ratio"][:size], functools.partial(row_name, batch)
            logits = self.teacher.logits(batch["crops"], batch["partner"], ratio, name_row=name_row)
            yield start, rendered_records(batch, logits[: stop - start])


def check_machine(store: StoreReader, teacher_pass: TeacherPass) -> str | None:
    """Runs the teacher on the last stored batch again, and compares its logits with the store.

    Returns:
      None if they are bit-equal; otherwise a description of the difference, which is within the rounding of another machine.

    Raises:
      DataError: the difference is larger, or a view differs; nothing may be appended.
    """
    codec = store.spec.make_codec()
    end = store.views.num_records
    first = max(end - teacher_pass.view_input.batch_size, 0)
    ((_, fresh),) = teacher_pass.records(first, end)
    stored = store.views.read(np.arange(first, end)).logits
    here = codec.decode(codec.encode(fresh.logits, first_view=first))
    if np.array_equal(here, stored):
        return None
    difference = np.abs(stored - here)
    worst = float(difference.max())
    if (difference > codec.allowed_difference(fresh.logits, arithmetic_tolerance(fresh.logits))).any():
        raise DataError(
            f"--write_back: the teacher's logits for views {first}..{end - 1} differ from the stored ones by up to {worst:.3g}, "
            f"more than rounding allows ({ARITHMETIC_TOLERANCE:g} of the largest); nothing is appended to {store.path}"
        )
    return (
        f"{int((here != stored).sum())} of {here.size} logits for views {first}..{end - 1} differ from the stored ones by up to "
        f"{worst:.3g}, because this machine rounds differently; appended shards will not be byte-equal to those of the machine "
        "that wrote the store"
    )


class RecordCallback(tf.keras.callbacks.Callback):
    """Adds the records of each step; comes before callbacks that expect scalars only."""

    def __init__(self, write_back: WriteBack, preemption: Preemption) -> None:
        super().__init__()
        self._supports_tf_logs = True  # pass tensors, and the dict itself
        self._write_back = write_back
        self._preemption = preemption

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Removes the records from the step's outputs, if there are any, and adds them."""
        del batch
        if logs is None or RECORD not in logs:
            return
        self._preemption.defer()
        column = {name: tensor.numpy() for name, tensor in logs.pop(RECORD).items()}
        first_view = int(logs["views"][0])
        stored = np.zeros(len(column["example"]), bool)
        self._write_back.add(first_view, ViewRecords(stored=stored, **column))


class Appending(contextlib.AbstractContextManager["Appending"]):
    """Context that appends the records of a run to its store.

    Attributes:
      callback: callback for `fit`, before the run's own.
    """

    def __init__(
        self,
        store: StoreReader,
        teacher_pass: TeacherPass,
        *,
        batch_size: int,
        views_per_shard: int,
        preemption: Preemption,
    ) -> None:
        self._store = store
        self._teacher_pass = teacher_pass
        self._batch_size = batch_size
        self._views_per_shard = views_per_shard
        self._write_back = WriteBack(store, views_per_shard=views_per_shard)
        self._preemption = preemption
        self.callback = RecordCallback(self._write_back, preemption)

    @property
    def epochs(self) -> int:
        """Number of epochs appended so far."""
        return self._write_back.published_epochs

    def begin(self, step: int) -> None:
        """Prepares for step `step`: compares machines, and runs the teacher on views that a crash lost.

        Raises:
          UserError: more than a shard is missing, so that the cause is not a crash.
        """
        if (difference := check_machine(self._store, self._teacher_pass)) is not None:
            print(f"--write_back: {difference}", flush=True)
        first, stop = self._write_back.next_view, step * self._batch_size
        if stop - first > self._views_per_shard:
            epochs = -(-stop // self._store.spec.num_examples)
            raise UserError(
                f"--write_back: the run continues at view {stop:,}, but {self._store.path} ends at view {first:,}, and the logits "
                f"in between were not kept; precompute --epochs={epochs} first, or continue without --write_back"
            )
        if stop > first:
            print(
                f"--write_back: running the teacher again on {stop - first:,} views that were trained on but not appended",
                flush=True,
            )
        self._fill(stop)

    def _fill(self, stop: int) -> None:
        if stop > self._write_back.next_view:
            for first, records in self._teacher_pass.records(self._write_back.next_view, stop):
                self._write_back.add(first, records)

    def finish(self) -> None:
        """After the last step: completes an epoch that lacks only the views that do not fill a batch."""
        missing = -self._write_back.next_view % self._store.spec.num_examples
        if missing < self._batch_size:
            self._fill(self._write_back.next_view + missing)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Publishes the whole epochs, except after an error, which may come from writing."""
        if self._write_back.adding or not (kind is None or issubclass(kind, Interrupted)):
            return
        self._preemption.defer()
        self._write_back.close()
        held = self._store.epochs + self.epochs
        print(
            f"--write_back: {counted(self.epochs, 'epoch')} appended to {self._store.path}, which has {held:,} now",
            flush=True,
        )
        if kind is None:
            self._preemption.resume("training is complete, evaluation and export are not")


@contextlib.contextmanager
def opened_store(
    paths: Sequence[str],
    *,
    write_back: bool,
    follow: bool = False,
    shard_cache_bytes: int = SHARD_CACHE_BYTES,
    **combination: Any,
) -> Iterator[ViewStore]:
    """Context with open stores.

    Args:
      paths: location of each store; of a single one with `write_back`.
      write_back: whether to hold the lock of the store, to append to it.
      **combination: arguments of `combine`.

    Raises:
      UserError: the store does not exist, another process is writing it, or it is in a bucket and `write_back` is True.
      DataError: the store is damaged.
    """
    if not write_back:
        yield open_stores(
            paths,
            shard_cache_bytes=shard_cache_bytes,
            open_store=wait_for_store if follow else StoreReader,
            **combination,
        )
        return
    (path,) = paths
    if is_url(path):
        raise UserError(
            f"--write_back: needs a store on a local disk, got --store={path}; copy the store, or extend it with "
            "pipeline.precompute"
        )
    Spec.load(path)  # before creating a lock where there is no store
    with writer_lock(Path(path)):
        yield combine([StoreReader(path)], **combination)
