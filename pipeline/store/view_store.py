"""What a run replays: the views of one store, of several stores, or of a store at another image size."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from pipeline.store.classes import Classes
from pipeline.store.identity import DatasetIdentity
from pipeline.store.layout import VIEWS_SPLIT
from pipeline.store.spec import Spec
from pipeline.store.splits import may_overlap
from pipeline.views.policies.base import ViewPolicy
from pipeline.views.records import RecordSource, ViewRecords


class StoredRecords(RecordSource, Protocol):
    """Records of one split that are stored, of one store or of several.

    Attributes:
      split: name of the split.
      num_records: number of published records; of the training views, those of whole epochs.
    """

    split: str

    @property
    def num_records(self) -> int: ...

    def read(self, views: np.ndarray) -> ViewRecords:
        """Records of views int64 [n], in any order, with duplicates allowed."""


class ViewStore(abc.ABC):
    """Stored views with the logits of one teacher, or of several.

    Attributes:
      location: directory or URL, for messages.
      spec: spec of the store, or of the first of several.
      classes: names of the teacher's classes, and the labels that they are compared with.
      views: records of the training views.
      eval_splits: names of the splits with evaluation logits.
    """

    location: str
    spec: Spec
    classes: Classes
    views: StoredRecords
    eval_splits: list[str]

    @property
    @abc.abstractmethod
    def stores(self) -> Sequence[ViewStore]:
        """The stores, 1 or more."""

    @property
    def weights(self) -> Sequence[float]:
        """Weight of each store's logits in the mean, each exact in float32."""
        return (1.0,)

    @property
    def image_size(self) -> int:
        """Side of a rendered crop in pixels."""
        return self.spec.policy.image_size

    @property
    def epochs(self) -> int:
        """Number of whole epochs."""
        return self.views.num_records // self.spec.num_examples

    @property
    @abc.abstractmethod
    def view_bytes(self) -> int:
        """Size of the published training views in bytes."""

    @property
    def held_out_splits(self) -> list[str]:
        """Evaluated splits and slices that share no example with the training split, according to their names."""
        return [name for name in self.eval_splits if not may_overlap(name, self.spec.dataset.split)]

    def identity(self) -> dict[str, Any]:
        """What determines crops and logits, as JSON: a digest `spec`, and more where that is not a single store's."""
        return {"spec": self.spec.digest()}

    def policy(self) -> ViewPolicy:
        """The view policy at `image_size`."""
        return dataclasses.replace(self.spec.policy, image_size=self.image_size)

    @abc.abstractmethod
    def eval_reader(self, split: str) -> StoredRecords:
        """Opens the teacher's logits on the evaluation crops of a split.

        Raises:
          UserError: there are none.
        """

    @abc.abstractmethod
    def refresh(self) -> None:
        """Adds newly published epochs to `views`. Must not run while records are read.

        Raises:
          DataError: the metadata are damaged, or shards that were published before have changed.
        """

    @abc.abstractmethod
    def check_files(self) -> None:
        """Checks that every published shard exists and has the size in the manifest, without opening it.

        Raises:
          DataError: names the first one with both sizes.
        """

    def check_renderer(self) -> None:
        """Checks the render probe of each store on this machine.

        Raises:
          DataError: TensorFlow renders differently on this machine.
        """
        for store in self.stores:
            store.spec.check_renderer()

    @abc.abstractmethod
    def check_dataset(self, found: DatasetIdentity, *, split: str = VIEWS_SPLIT) -> None:
        """Compares a data set's identity with the stored one.

        Raises:
          DataError: lists the differing fields with both values.
        """
