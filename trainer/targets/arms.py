"""Arms of a comparison: what a student is trained on, and where its targets come from.

All of them take the views of one store, in its order, with its boxes and flips, and check both fingerprints of every
crop; none trains past the last stored view.

- `offline`: the stored logits. With a teacher, training goes on online past the store's end, which is no comparison.
- `online`: the same views; a live teacher makes their logits, from the first step on. The stored ones are not used.
- `consistent`: without mixup (ratio 1); the live teacher sees the student's crop. The control of the next two.
- `fixed`: without mixup; one logit vector an image, the teacher's for the evaluation crop, from the store's `eval/`.
  What Beyer et al. 2021 call a fixed teacher, and show to overfit.
- `independent`: without mixup; the live teacher sees another crop of the same image: the one of the epoch before (in
  the first, of the second), wherever in that epoch the image stands. So the teacher's crop is a stored view too,
  checked like the student's, and the same however far the store has grown. Their independent noise.
"""

from __future__ import annotations

import dataclasses
import functools
import re

import numpy as np
import tensorflow as tf

from pipeline.errors import DataError, UserError
from pipeline.inputs.dataset import Dataset
from pipeline.store.reader import SplitReader, Store
from pipeline.views.input import Batch, ViewInput
from pipeline.views.order import example_of_view, examples_at
from pipeline.views.records import RecordSource, ViewRecords
from pipeline.views.source import ImageSource, LoadedImages
from trainer.targets.replay import replay_input


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """What makes an arm's batches differ from a replay's.

    Attributes:
      name: of the arm.
      what: the targets and the views, in a line.
      live: whether a teacher makes every logit, from the first step on.
      mixed: whether views are mixed as stored; without, their ratio is 1.
    """

    name: str
    what: str
    live: bool
    mixed: bool

    def check(self, store: Store) -> None:
        """Whether a store has what the arm needs.

        Raises:
          UserError: it has not; says what to precompute.
        """
        if self.name == "fixed":
            _fixed_targets(store)
        if self.name == "independent" and store.epochs < 2:
            raise UserError(
                f"the arm `independent` takes the teacher's crops from another epoch, and {store.location} holds one alone; "
                "precompute --epochs=2 or more"
            )

    def records(self, store: Store) -> RecordSource:
        """The records of the arm's views."""
        if self.mixed:
            return store.views
        if self.name == "fixed":
            return FixedTargets(store.views, _fixed_targets(store))
        return PairedViews(store.views) if self.name == "independent" else UnmixedViews(store.views)

    def input(
        self,
        store: Store,
        dataset: Dataset,
        *,
        batch_size: int,
        image_cache_bytes: int,
        records: RecordSource | None = None,
    ) -> ViewInput:
        """The input pipeline of a replica's batches.

        Args:
          store: gives the views.
          dataset: gives the images; compared with the store before.
          batch_size: b, of a replica.
          image_cache_bytes: for decoded images; used if all of them fit.
          records: in place of the arm's own: those that go on past the store's end.
        """
        view_input = replay_input(
            store,
            dataset,
            batch_size=batch_size,
            image_cache_bytes=image_cache_bytes,
            records=records or self.records(store),
        )
        if self.name != "independent":
            return view_input
        plan = PairedPlan(
            num_examples=store.spec.num_examples,
            seed=store.spec.seed,
            batch_size=batch_size,
        )
        return dataclasses.replace(view_input, plan=plan, extra_crops=batch_size)

    def batches(self, batches: tf.data.Dataset) -> tf.data.Dataset:
        """The batches of `replay.step_batches`, `with_stored` where the arm is live, as the Distiller takes them."""
        return batches.map(self._adapt) if self.live else batches

    def _adapt(self, batch: Batch) -> Batch:
        batch = {**batch, "stored": tf.zeros_like(batch["stored"])}
        if self.name == "independent":
            size = batch["views"].shape[0]
            # crops: uint8 [2 * b, S, S, 3], the student's and then the teacher's
            batch |= {"crops": batch["crops"][:size], "teacher_crops": batch["crops"][size:]}
        return batch


OFFLINE = Arm(name="offline", what="the stored logits of the stored views", live=False, mixed=True)
ARMS = {
    arm.name: arm
    for arm in (
        OFFLINE,
        Arm(name="online", what="a live teacher on the stored views", live=True, mixed=True),
        Arm(
            name="fixed",
            what="the teacher's logits for each image's evaluation crop, without mixup",
            live=False,
            mixed=False,
        ),
        Arm(
            name="independent",
            what="a live teacher on another crop of the same image, without mixup",
            live=True,
            mixed=False,
        ),
        Arm(name="consistent", what="a live teacher on the same crop, without mixup", live=True, mixed=False),
    )
}


@dataclasses.dataclass(frozen=True)
class UnmixedViews:
    """A `RecordSource`: stored views with ratio 1, which leaves a crop as it is, bit for bit."""

    stored: SplitReader

    @property
    def num_examples(self) -> int:
        """N."""
        return self.stored.num_examples

    @property
    def num_classes(self) -> int:
        """C."""
        return self.stored.num_classes

    def fetch(self, views: np.ndarray, source: ImageSource) -> tuple[ViewRecords, LoadedImages]:
        """Implements `RecordSource`."""
        records, loaded = self.stored.fetch(views, source)
        return dataclasses.replace(records, ratio=np.ones_like(records.ratio)), loaded


@dataclasses.dataclass(frozen=True)
class FixedTargets(UnmixedViews):
    """Unmixed views, each with the teacher's logits for the evaluation crop of its image.

    Attributes:
      targets: evaluation logits; record `i` is of example `i` of the views' split.
    """

    targets: SplitReader

    def fetch(self, views: np.ndarray, source: ImageSource) -> tuple[ViewRecords, LoadedImages]:
        """Implements `RecordSource`.

        Raises:
          DataError: the evaluation logits are of another image.
        """
        records, loaded = super().fetch(views, source)
        targets = self.targets.read(records.example)
        if (wrong := targets.source_hash != records.source_hash).any():
            row = int(np.argmax(wrong))
            raise DataError(
                f"view {views[row]} (example {records.example[row]}): source fingerprint is "
                f"{records.source_hash[row]:08x} in the store, {targets.source_hash[row]:08x} in its eval/ "
                f"({self.targets.split}); precompute again"
            )
        return dataclasses.replace(records, logits=targets.logits), loaded


def _fixed_targets(store: Store) -> SplitReader:
    """Evaluation logits of the split that the views are of; of the whole one where that is its beginning.

    Raises:
      UserError: the store has none.
    """
    split = store.spec.dataset.split
    whole = re.sub(r"\[:.*\]$", "", split)  # whose examples begin with those of `train[:90%]`
    for name in (split, whole):
        if name in store.eval_splits:
            return store.eval_reader(name)
    raise UserError(
        f"the arm `fixed` needs the teacher's evaluation logits of the training split {split}; {store.location} has those of "
        f"{', '.join(store.eval_splits) or 'no split'}: precompute with --eval_splits={','.join([*store.eval_splits, whole])} "
        "(all of them by default)"
    )


@dataclasses.dataclass(frozen=True)
class PairedViews(UnmixedViews):
    """Unmixed views, planned by `PairedPlan`: the second half are other views of the first half's images."""

    def fetch(self, views: np.ndarray, source: ImageSource) -> tuple[ViewRecords, LoadedImages]:
        """Implements `RecordSource`; views int64 [2 * B].

        Raises:
          DataError: the store's order is not the one that is drawn now.
        """
        records, loaded = super().fetch(views, source)
        own, other = np.split(records.example, 2)
        if (wrong := own != other).any():
            row = int(np.argmax(wrong))
            raise DataError(
                f"view {views[row]} is of example {own[row]}, view {views[len(own) + row]} of {other[row]}; expected two "
                "views of one image: the store was not drawn in this version's order"
            )
        return records, loaded


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairedPlan:
    """`ViewInput.plan` of consecutive views, and as many others of the same images; K = 2 * B.

    Attributes:
      num_examples: N.
      seed: of the store's order.
      batch_size: B.
    """

    num_examples: int
    seed: int
    batch_size: int

    def __call__(self, start: int) -> tuple[np.ndarray, np.ndarray]:
        """First view to (views int64 [2 * B], partner int32 [B]: each its own)."""
        views = np.arange(start, start + self.batch_size, dtype=np.int64)
        return np.concatenate([views, self.other(views)]), np.arange(self.batch_size, dtype=np.int32)

    def other(self, views: np.ndarray) -> np.ndarray:
        """The views of the same images in the epoch before, for the first in the second: int64 [n] to int64 [n]."""
        examples = example_of_view(views, num_examples=self.num_examples, seed=self.seed)
        epochs = np.abs(views // self.num_examples - 1)
        out = np.empty_like(views)
        for epoch in np.unique(epochs).tolist():
            where = epochs == epoch
            positions = _positions(self.num_examples, self.seed, epoch)[examples[where]]
            out[where] = epoch * self.num_examples + positions
        return out


@functools.lru_cache(maxsize=4)  # a batch spans two epochs, or more where it is longer than one
def _positions(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    """Where in an epoch each example stands, int64 [N]; O(N), once an epoch."""
    order = examples_at(np.arange(num_examples), num_examples=num_examples, seed=seed, epoch=epoch)
    return np.argsort(order)
