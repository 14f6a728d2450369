"""Past the last stored view: the same sequence of views goes on, drawn now, with a live teacher's logits."""

from __future__ import annotations

import dataclasses

import numpy as np

from pipeline.store.reader import SplitReader, Store
from pipeline.views.records import SampledViews, ViewRecords
from pipeline.views.source import ImageSource, LoadedImages


@dataclasses.dataclass(frozen=True)
class ContinuedViews:
    """A `RecordSource`: stored views from the store, the others drawn as the precompute would have.

    Attributes:
      stored: reader of the store's views.
      sampled: draws the others.
      first_sampled: views from here on are drawn; the store's end, or 0 to be online from the start.
    """

    stored: SplitReader
    sampled: SampledViews
    first_sampled: int

    @classmethod
    def of(cls, store: Store, *, first_sampled: int | None = None) -> ContinuedViews:
        """The views of a store, continued without bound."""
        spec = store.spec
        sampled = SampledViews(
            policy=spec.policy,
            seed=spec.seed,
            num_examples=spec.num_examples,
            num_classes=spec.num_classes,
        )
        end = store.views.num_records
        return cls(store.views, sampled, end if first_sampled is None else min(first_sampled, end))

    @property
    def num_examples(self) -> int:
        """N."""
        return self.sampled.num_examples

    @property
    def num_classes(self) -> int:
        """C."""
        return self.sampled.num_classes

    def fetch(self, views: np.ndarray, source: ImageSource) -> tuple[ViewRecords, LoadedImages]:
        """Implements `RecordSource`; a batch may straddle the store's end."""
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
