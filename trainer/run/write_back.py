"""`--write_back`: the online teacher's logits are appended to the store, where the next student finds them.

The shards are the ones that the precompute would have written, byte for byte: the same teacher runs in batches
of the same size (`online_teacher.BatchedTeacher`), a view's logits do not depend on its neighbours in the batch, and
records, chunks and files are made by the precompute's own functions. It is as if `pipeline.precompute` had been
asked for the next few epochs each time. Before the first step this is put to the test: the last stored views
are run again, and compared with the store (`check_machine`).

Only whole epochs are published, by the store's own law: data first, `dataset_info.json` last. A shard is kept in
memory until it is full, serialized: `--views_per_shard` views, 2 bytes a class and view and about 20 more with
float16. It holds as many whole epochs as fit, or where an epoch is longer than a shard, an epoch takes several,
and is published with its last one. How a run ends does not matter to what is published:

- at its end, and after SIGTERM, the whole epochs that the unfinished shard has are published as a shorter shard;
  a last epoch that lacks less than a batch, the views that filled none, is completed.
- a crash loses the unfinished shard. The run goes on from a checkpoint that is past those views, perhaps, and
  will not see them again: the teacher runs on them once more, at start. That is less than a shard's worth, since
  whatever was finished is on disk, and adopted if it verifies. Spilling rows at each checkpoint instead would
  save those minutes, for a second format of unpublished rows, and its own crashes.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import functools
from collections.abc import Iterator
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
from pipeline.store.layout import VIEWS_SPLIT
from pipeline.store.reader import Store
from pipeline.store.shards import ShardInfo, ShardTask, adopt_shard, write_note, write_shard
from pipeline.store.spec import Spec
from pipeline.views.input import ViewInput
from pipeline.views.records import ViewRecords
from trainer.run.following import wait_for_store
from trainer.run.preemption import Preemption

RECORD = (
    "record"  # of a batch: what its views' records need besides the logits; of a step's outputs: with them
)


class WriteBack:
    """Appends records to a store as they come; the caller holds the store's lock.

    Args:
      store: opened under the lock.
      views_per_shard: at most.

    Attributes:
      next_view: the first view whose logits are still wanted.
      adding: whether `add` is under way, or was when an exception ended it.

    Raises:
      UserError: the store is full.
    """

    def __init__(self, store: Store, *, views_per_shard: int) -> None:
        self._store, self._spec = store, store.spec
        self._codec = store.spec.make_codec()
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
        """Epochs that have been published here."""
        num_examples = self._spec.num_examples
        return sum(self._lengths) // num_examples - self._published_before // num_examples

    def _plan(self) -> None:
        """Cuts the shards that are published next, together."""
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
        """A new shard, of which nothing is known."""
        self._task = self._tasks[0]
        self._encoder = RecordEncoder(self._spec)
        self._serialized: list[bytes] = []
        self._waiting: ViewRecords | None = None  # fewer than a teacher batch
        # Number of views of this shard up to the end of its last whole epoch, and their encoder.
        self._whole_epochs = (0, self._encoder)

    def add(self, first_view: int, records: ViewRecords) -> None:
        """Takes the records of consecutive views with the teacher's logits as they were before the codec.

        Args:
          first_view: index of the first; none may be missing before it.
          records: of the views; those that are known already are passed over.

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
            # Not beyond this shard.
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
        """One teacher batch, as the precompute cuts and sums them."""
        first = self._task.first + len(self._serialized)
        epoch_end = (first + len(chunk.example)) // self._spec.num_examples * self._spec.num_examples
        if epoch_end > first:
            encoder = copy.copy(self._encoder)
            encoder.encode(chunk.take(np.arange(epoch_end - first)), first_view=first)
            self._whole_epochs = (epoch_end - self._task.first, encoder)
        self._serialized += self._encoder.encode(chunk, first_view=first)

    def _write(self, task: ShardTask, serialized: list[bytes], encoder: RecordEncoder) -> None:
        path = self._store.path
        # In place of what an interrupted run may have left there, cut elsewhere: nothing is published at this number.
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
        publish_results(self._store.path, self._spec, self._results, identities)
        remove_notes(self._store.path)
        self._lengths += [result.info.records for result in self._results]
        self._plan()

    def close(self) -> None:
        """Publishes the whole epochs that the unfinished shard has; later views are dropped."""
        num_examples = self._spec.num_examples
        begun = self._task.first + len(self._serialized)
        end = self.next_view // num_examples * num_examples
        if len(self._tasks) > 1 or self._results or end <= self._task.first:
            return  # shards of one epoch: it is not whole, and the finished ones wait for the next run
        if self._waiting is not None and end > begun:
            self._encode(self._waiting.take(np.arange(end - begun)))
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
    """The teacher outside of training, as the precompute runs it.

    Attributes:
      view_input: of the teacher's batch size.
      teacher: the spec's.
    """

    view_input: ViewInput
    teacher: Teacher

    def records(self, first: int, stop: int) -> Iterator[tuple[int, ViewRecords]]:
        """(first view, records of its teacher batch) of the views `first .. stop - 1`.

        Raises:
          UserError, DataError: see `Teacher.logits` and `ViewInput.batches`.
        """
        size = self.view_input.batch_size
        starts = np.arange(first, stop, size)
        for start, batch in zip(starts.tolist(), self.view_input.batches(starts), strict=True):
            ratio, name_row = batch["ratio"][:size], functools.partial(row_name, batch)
            logits = self.teacher.logits(batch["crops"], batch["partner"], ratio, name_row=name_row)
            yield start, rendered_records(batch, logits[: stop - start])


def check_machine(store: Store, teacher_pass: TeacherPass) -> str | None:
    """Runs the teacher on the last stored batch again: are a machine's logits here those of the store?

    Returns:
      None if every bit is the same; else by how much they differ, within what another machine's arithmetic may.

    Raises:
      DataError: they differ by more, or the views do; nothing must be appended.
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
            f"--write_back: of views {first}..{end - 1} the teacher's logits differ by up to {worst:.3g} from the "
            f"stored ones, where rounding allows {ARITHMETIC_TOLERANCE:g} of the largest; nothing is appended to {store.path}"
        )
    return (
        f"{int((here != stored).sum())} of {here.size} logits of views {first}..{end - 1} differ from the stored ones, by "
        f"at most {worst:.3g}: this machine rounds otherwise, and what is appended is not byte for byte what the "
        "store's own machine would have written"
    )


class Feed(tf.keras.callbacks.Callback):
    """Hands each step's records on; to come before callbacks that take all figures for scalars."""

    def __init__(self, write_back: WriteBack, preemption: Preemption) -> None:
        super().__init__()
        self._supports_tf_logs = True  # tensors, and the dict itself
        self._write_back = write_back
        self._preemption = preemption

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Takes the records out of the step's outputs, where it has any."""
        del batch
        if logs is None or RECORD not in logs:
            return
        self._preemption.defer()
        column = {name: tensor.numpy() for name, tensor in logs.pop(RECORD).items()}
        first_view = int(logs["views"][0])
        stored = np.zeros(len(column["example"]), bool)
        self._write_back.add(first_view, ViewRecords(stored=stored, **column))


class Appending(contextlib.AbstractContextManager["Appending"]):
    """A run's write-back: what is missing at its start, its steps, and how it ends.

    Args:
      store: opened under its lock.
      teacher_pass: for what no step will bring.
      batch_size: B.
      views_per_shard: at most.
      preemption: of the run.

    Attributes:
      callback: to be given to `fit`, before the run's own.
    """

    def __init__(
        self,
        store: Store,
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
        self.callback = Feed(self._write_back, preemption)

    @property
    def epochs(self) -> int:
        """Epochs that have been appended so far."""
        return self._write_back.published_epochs

    def begin(self, step: int) -> None:
        """Before step `step`: compares machines, and makes up for the views that a crash lost.

        Raises:
          UserError: more than a shard is missing, which no crash of a run that writes back leaves.
          DataError: see `check_machine`.
        """
        if (difference := check_machine(self._store, self._teacher_pass)) is not None:
            print(f"--write_back: {difference}", flush=True)
        first, stop = self._write_back.next_view, step * self._batch_size
        if stop - first > self._views_per_shard:
            epochs = -(-stop // self._store.spec.num_examples)
            raise UserError(
                f"--write_back: the run goes on at view {stop:,}, the store {self._store.path} ends at {first:,}, and the "
                f"logits in between were not kept; precompute --epochs={epochs} first, or go on without --write_back"
            )
        if stop > first:
            print(
                f"--write_back: the teacher runs again on {stop - first:,} views that were trained on and not yet "
                "appended",
                flush=True,
            )
        self._fill(stop)

    def _fill(self, stop: int) -> None:
        if stop > self._write_back.next_view:
            for first, records in self._teacher_pass.records(self._write_back.next_view, stop):
                self._write_back.add(first, records)

    def finish(self) -> None:
        """After the last step: completes an epoch that lacks only the views that fill no batch."""
        missing = -self._write_back.next_view % self._store.spec.num_examples
        if missing < self._batch_size:
            self._fill(self._write_back.next_view + missing)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Publishes the whole epochs; not after an error, which may be of the writing itself."""
        if self._write_back.adding or not (kind is None or issubclass(kind, Interrupted)):
            return
        self._preemption.defer()
        self._write_back.close()
        held = self._store.epochs + self.epochs
        print(
            f"--write_back: {counted(self.epochs, 'epoch')} appended to {self._store.path}, which holds {held:,} now",
            flush=True,
        )
        if kind is None:
            self._preemption.resume("trained to the end; evaluation and export are left")


@contextlib.contextmanager
def opened_store(
    path: str, *, write_back: bool, follow: bool = False, shard_cache_bytes: int = SHARD_CACHE_BYTES
) -> Iterator[Store]:
    """Opens a store, and holds its lock if it is to be written; with `follow`, waits for its first epoch.

    Raises:
      UserError: there is none, somebody else is writing it, or it is to be written in a bucket.
      DataError: it is damaged.
    """
    if not write_back:
        opened = wait_for_store if follow else Store
        yield opened(path, shard_cache_bytes=shard_cache_bytes)
        return
    if is_url(path):
        raise UserError(
            f"--write_back: appends to a store on this machine's file systems, --store={path} is in a bucket; copy it here, "
            "or grow it with pipeline.precompute"
        )
    Spec.load(path)  # before a lock is made where no store is
    with writer_lock(Path(path)):
        yield Store(path)
