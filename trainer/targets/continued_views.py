"""Views past the end of a store: the same sequence, drawn as the precompute would have drawn it."""

from __future__ import annotations

import dataclasses

import numpy as np

from pipeline.store.view_store import StoredRecords
from pipeline.views.records import SampledViews, ViewRecords
from pipeline.views.source import ImageSource, LoadedImages


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContinuedViews(SampledViews):
    """A `RecordSource` that reads stored views and draws all later ones.

    Attributes:
      first_sampled: First view that is drawn instead of read; 0 draws all of them.
    """

    stored: StoredRecords
    first_sampled: int

    def fetch(self, views: np.ndarray, source: ImageSource) -> tuple[ViewRecords, LoadedImages]:
        """Implements `RecordSource`; a batch may have views of both kinds."""
        inside = views < self.first_sampled
        if inside.all():
            return self.stored.fetch(views, source)
        if not inside.any():
            return super().fetch(views, source)
        known = self.stored.read(views[inside])
        examples = self.examples(views)
        examples[inside] = known.example
        loaded = source.load(examples)
        drawn = self.draw(views, loaded)
        for field in dataclasses.fields(ViewRecords):
            getattr(drawn, field.name)[inside] = getattr(known, field.name)
        return drawn, loaded
