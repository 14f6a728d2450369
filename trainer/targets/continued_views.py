"""Views past the end of a store: the same sequence, drawn as the precompute would have drawn it."""

from __future__ import annotations

import dataclasses

import numpy as np

from pipeline.store.reader import SplitReader, StoreReader
from pipeline.views.records import SampledViews, ViewRecords
from pipeline.views.source import ImageSource, LoadedImages


@dataclasses.dataclass(frozen=True)
class ContinuedViews:
    """A `RecordSource` that reads stored views and draws all later ones.

    Attributes:
      stored: Reader of the store's views.
      sampled: Draws views.
      first_sampled: First view that is drawn instead of read; 0 draws all of them.
    """

    stored: SplitReader
    sampled: SampledViews
    first_sampled: int

    @classmethod
    def of(cls, store: StoreReader, *, first_sampled: int) -> ContinuedViews:
        """The views of a store, continued without end.

        Args:
          store: Gives the view axis and the stored views.
          first_sampled: First view that is drawn; at most the number of stored views is used.
        """
        spec = store.spec
        sampled = SampledViews(
            policy=spec.policy,
            seed=spec.seed,
            num_examples=spec.num_examples,
            num_classes=spec.num_classes,
        )
        return cls(store.views, sampled, min(first_sampled, store.views.num_records))

    @property
    def num_examples(self) -> int:
        """N."""
        return self.sampled.num_examples

    @property
    def num_classes(self) -> int:
        """C."""
        return self.sampled.num_classes

    def fetch(self, views: np.ndarray, source: ImageSource) -> tuple[ViewRecords, LoadedImages]:
        """Implements `RecordSource`; a batch may have views of both kinds."""
        inside = views < self.first_sampled
        if inside.all():
            return self.stored.fetch(views, source)
        if not inside.any():
            return self.sampled.fetch(views, source)
        known = self.stored.read(views[inside])
        examples = self.sampled.examples(views)
        examples[inside] = known.example
        loaded = source.load(examples)
        drawn = self.sampled.draw(views, loaded)
        for field in dataclasses.fields(ViewRecords):
            getattr(drawn, field.name)[inside] = getattr(known, field.name)
        return drawn, loaded
