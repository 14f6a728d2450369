"""Input pipelines that replay stored views, with the comparisons that each image size needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from pipeline.cli.environment import usable_memory
from pipeline.store.view_store import ViewStore
from pipeline.views.input import ViewInput
from pipeline.views.records import RecordSource
from pipeline.views.render import Renderer
from pipeline.views.source import EncodedImages, ImageSource


def add_other_sizes(
    view_input: ViewInput,
    store: ViewStore,
    *,
    records: Callable[[ViewStore], RecordSource],
    renderer: Callable[[ViewStore], Renderer],
) -> ViewInput:
    """Adds the image sizes of the stores to an input at the size of `store`, so that crops are compared with every store.

    Args:
      view_input: input of batches of `store`.
      store: one store, or several combined ones.
      records: returns the records of one of them.
      renderer: returns the renderer of its crops.

    Returns:
      The input with one of `others` for each image size that differs from the input's.
    """
    # Stores of equal size have equal fingerprints, which `CombinedRecords` compares.
    sizes = {part.image_size: part for part in reversed(store.stores) if part.image_size != store.image_size}
    if not sizes:
        return view_input
    available = usable_memory() // 4 if view_input.buffer_bytes is None else view_input.buffer_bytes
    own = dataclasses.replace(view_input, buffer_bytes=available // (1 + len(sizes)))
    others = [
        dataclasses.replace(own, records=records(part), source=own.source.rendered_by(renderer(part)))
        for _, part in sorted(sizes.items())
    ]
    return dataclasses.replace(own, others=tuple(others))


def replay_input(
    store: ViewStore, images: EncodedImages, batch_size: int, *, image_cache_bytes: int = 0
) -> ViewInput:
    """Batches of the training views of a store, each compared with its record.

    Args:
      store: one store, or several combined ones.
      images: their data set.
      batch_size: B.
      image_cache_bytes: memory for decoded images, used if all of them fit.
    """
    source = ImageSource(images, store.policy().renderer(), cache_bytes=image_cache_bytes)
    return add_other_sizes(
        ViewInput(store.views, source, batch_size),
        store,
        records=lambda part: part.views,
        renderer=lambda part: part.policy().renderer(),
    )
