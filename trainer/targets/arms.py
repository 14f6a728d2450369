"""Arms of a comparison: what a student is trained on, and where its targets come from.

All arms train on the views of one store, in the store's order and with the stored boxes and flips. Both fingerprints of
every crop are verified.

An arm is a subclass of `Arm`, listed in `ARMS` here and, for parsing flags without TensorFlow, in
`trainer.config.choices`; `trainer.pages.arm_styles` gives it a color. It provides a name, a summary and whether it is
live. Where it differs from a plain replay, it overrides `check` (what the store must have), `records` (parameters and
logits), `crops` (the crops of a batch) and `adapt` (the batch for the Distiller).
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import tensorflow as tf

from pipeline.errors import DataError, UserError
from pipeline.store.view_store import StoredRecords, ViewStore
from pipeline.views.input import Batch
from pipeline.views.order import example_of_view, examples_at
from pipeline.views.records import RecordSource, ViewRecords
from pipeline.views.source import ImageSource, LoadedImages


class Arm:
    """What distinguishes an arm from a replay of the stored views and logits.

    Attributes:
      summary: Targets and views in one line, for people who have not read the paper.
      live: Whether a teacher computes every logit, from the first step on.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    live: ClassVar[bool] = False

    def check(self, store: ViewStore) -> None:
        """Checks that a store has what the arm needs.

        Raises:
          UserError: it does not; the message names what to precompute.
        """

    def records(self, store: ViewStore) -> RecordSource:
        """The records of the arm's views."""
        return store.views

    def crops(self, store: ViewStore, *, batch_size: int) -> dict[str, Any]:
        """Arguments of `ViewInput` that select the crops of a batch of b views."""
        del store, batch_size
        return {}

    def adapt(self, batch: Batch) -> Batch:
        """A batch of `Targets` to the batch that the Distiller gets."""
        return batch


class Offline(Arm):
    """The stored views and logits. Of all arms, only this one may continue online past the stored views."""

    name = "offline"
    summary = "replays the stored views with their stored teacher logits; no teacher in memory"


class Online(Arm):
    """The stored views, with logits that a live teacher computes from the first step on."""

    name = "online"
    summary = "runs the live teacher on the stored views"
    live = True


class Fixed(Arm):
    """Views without mixup, and one logit vector per image: the teacher's for its evaluation crop, from `eval/`.

    Beyer et al. 2021 call this a fixed teacher and show that it overfits.
    """

    name = "fixed"
    summary = "one stored logit vector per image, for its evaluation crop; the student sees augmented crops without mixup"

    def check(self, store: ViewStore) -> None:
        """Implements `Arm`."""
        self._reader(store)

    def records(self, store: ViewStore) -> RecordSource:
        """Implements `Arm`."""
        return UnmixedViews(store.views, functools.partial(with_targets, self._reader(store)))

    @staticmethod
    def _reader(store: ViewStore) -> StoredRecords:
        """Evaluation logits of the split that the views are drawn from, or of the whole split that it begins."""
        split = store.spec.dataset.split
        whole = re.sub(r"\[:.*\]$", "", split)  # its examples begin with those of `train[:90%]`
        for name in (split, whole):
            if name in store.eval_splits:
                return store.eval_reader(name)
        raise UserError(
            f"arm `fixed` needs the teacher's evaluation logits of the training split {split}, but {store.location} has "
            f"those of {', '.join(store.eval_splits) or 'no split'}; precompute with "
            f"--eval_splits={','.join([*store.eval_splits, whole])}, or without --eval_splits for all splits"
        )


class Consistent(Arm):
    """Views without mixup, with a live teacher on the student's crop. The control of `fixed` and `independent`."""

    name = "consistent"
    summary = (
        "teacher and student see the same crop, without mixup; the control of the arms fixed and independent"
    )
    live = True

    def records(self, store: ViewStore) -> RecordSource:
        """Implements `Arm`."""
        return UnmixedViews(store.views)


class Independent(Arm):
    """Views without mixup, with a live teacher on another crop of the same image (the paper's independent noise).

    The teacher's crop is the view of the same image in the previous epoch, or in the second epoch for views of the
    first. It is a stored view too, verified like the student's, and does not depend on the length of the store.
    """

    name = "independent"
    summary = "teacher and student see different crops of an image, without mixup"
    live = True

    def check(self, store: ViewStore) -> None:
        """Implements `Arm`."""
        if store.epochs < 2:
            raise UserError(
                f"arm `independent` takes the teacher's crops from another epoch, but {store.location} has only one; "
                "precompute --epochs=2 or more"
            )

    def records(self, store: ViewStore) -> RecordSource:
        """Implements `Arm`."""
        return UnmixedViews(store.views, _check_pairs)

    def crops(self, store: ViewStore, *, batch_size: int) -> dict[str, Any]:
        """Implements `Arm`."""
        order = {"num_examples": store.spec.num_examples, "seed": store.spec.seed}
        plan = functools.partial(paired_plan, batch_size=batch_size, **order)
        return {"plan": plan, "extra_crops": batch_size}

    def adapt(self, batch: Batch) -> Batch:
        """Implements `Arm`."""
        size = batch["views"].shape[0]
        # crops: uint8 [2 * b, S, S, 3], the student's and then the teacher's
        teachers = tf.nest.map_structure(
            lambda crops: crops[size:], batch.get("teacher_crops", batch["crops"])
        )
        return {**batch, "crops": batch["crops"][:size], "teacher_crops": teachers}


OFFLINE = Offline()
ARMS = {arm.name: arm for arm in (OFFLINE, Online(), Fixed(), Independent(), Consistent())}


Change = Callable[[np.ndarray, ViewRecords], ViewRecords]


class UnmixedViews:
    """A `RecordSource` of stored views with ratio 1, which leaves a crop unchanged, bit for bit.

    Args:
      change: Checks or changes the records of views int64 [n].
    """

    def __init__(self, stored: StoredRecords, change: Change = lambda _, records: records) -> None:
        self._stored, self._change = stored, change
        self.num_examples, self.num_classes = stored.num_examples, stored.num_classes

    def fetch(self, views: np.ndarray, source: ImageSource) -> tuple[ViewRecords, LoadedImages]:
        """Implements `RecordSource`."""
        records, loaded = self._stored.fetch(views, source)
        unmixed = dataclasses.replace(records, ratio=np.ones_like(records.ratio))
        return self._change(views, unmixed), loaded


def with_targets(targets: StoredRecords, views: np.ndarray, records: ViewRecords) -> ViewRecords:
    """Replaces the logits by those for the evaluation crop; record `i` of `targets` belongs to example `i`."""
    found = targets.read(records.example)
    if (wrong := found.source_hash != records.source_hash).any():
        row = int(np.argmax(wrong))
        raise DataError(
            f"view {views[row]} (example {records.example[row]}): source fingerprint is "
            f"{records.source_hash[row]:08x} in the store, but {found.source_hash[row]:08x} in its eval/ "
            f"({targets.split}); precompute the store again"
        )
    return dataclasses.replace(records, logits=found.logits)


def _check_pairs(views: np.ndarray, records: ViewRecords) -> ViewRecords:
    """Passes on the records of views that `paired_plan` chose, int64 [2 * b]."""
    own, other = np.split(records.example, 2)
    if (wrong := own != other).any():
        row = int(np.argmax(wrong))
        raise DataError(
            f"view {views[row]} shows example {own[row]}, but view {views[len(own) + row]} shows example {other[row]}; "
            "expected two views of one image: another version drew the order of this store; precompute it again"
        )
    return records


def paired_plan(
    start: int, *, batch_size: int, num_examples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """A `ViewInput.plan` of b consecutive views followed by b other views of the same images, K = 2 * b.

    Returns:
      Views int64 [2 * b] and partner int32 [b]; each view is its own partner.
    """
    views = np.arange(start, start + batch_size, dtype=np.int64)
    other = other_views(views, num_examples=num_examples, seed=seed)
    return np.concatenate([views, other]), np.arange(batch_size, dtype=np.int32)


def other_views(views: np.ndarray, *, num_examples: int, seed: int) -> np.ndarray:
    """Views of the same images in the previous epoch, or in the second for the first: int64 [n] to int64 [n]."""
    examples = example_of_view(views, num_examples=num_examples, seed=seed)
    epochs = np.abs(views // num_examples - 1)
    out = np.empty_like(views)
    for epoch in np.unique(epochs).tolist():
        where = epochs == epoch
        out[where] = epoch * num_examples + _positions(num_examples, seed, epoch)[examples[where]]
    return out


@functools.lru_cache(maxsize=4)  # a batch spans two epochs, or more where it is longer than one
def _positions(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    """Position of each example in an epoch, int64 [N]; O(N), once per epoch."""
    order = examples_at(np.arange(num_examples), num_examples=num_examples, seed=seed, epoch=epoch)
    return np.argsort(order)
