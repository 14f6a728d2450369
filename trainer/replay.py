"""Store and data set to batches: what the student is shown, by step.

Step `t` trains on views `[t * B, (t + 1) * B)`. The input is a function of the step, so resuming is starting
elsewhere. A replay draws nothing; past the last stored view `trainer.online` continues.
"""

from __future__ import annotations

import tensorflow as tf

from pipeline.dataset import Dataset
from pipeline.store.reader import Store
from pipeline.views.input import Batch, ViewInput
from pipeline.views.records import RecordSource
from pipeline.views.render import training_renderer
from pipeline.views.source import ImageSource


def replay_input(
    store: Store,
    dataset: Dataset,
    *,
    batch_size: int,
    image_cache_bytes: int,
    records: RecordSource | None = None,
) -> ViewInput:
    """The input pipeline of a store's training views.

    Args:
      store: gives the views' parameters, fingerprints and logits.
      dataset: gives the images; compared with the store before.
      batch_size: B.
      image_cache_bytes: for decoded images; used if all of them fit.
      records: other source of records than the store alone, such as `online.ContinuedViews`.
    """
    renderer = training_renderer(store.spec.policy)
    source = ImageSource(dataset, renderer, cache_bytes=image_cache_bytes)
    return ViewInput(records or store.views, source, batch_size)


def step_batches(view_input: ViewInput, start: int, stop: int, *, with_stored: bool) -> tf.data.Dataset:
    """The batches of steps `start .. stop - 1`, as the Distiller takes them.

    Args:
      view_input: of batch size B, K = B + 2 crops a batch.
      start: first step.
      stop: one past the last step.
      with_stored: whether to say which views are stored: only where a teacher fills in the others.

    Returns:
      Dicts of `crops` uint8 [K, S, S, 3], `partner` int32 [B], `ratio` float32 [B], `logits` float32 [B, C]
      and, `with_stored`, `stored` bool [B]; cardinality `stop - start`.
    """
    size = view_input.batch_size

    def select(batch: Batch) -> Batch:
        out = {
            "crops": batch["crops"],
            "partner": batch["partner"],
            "ratio": batch["ratio"][:size],
            "logits": batch["logits"],
        }
        return {**out, "stored": batch["stored"][:size]} if with_stored else out

    starts = tf.data.Dataset.range(start * size, stop * size, size)
    batches = view_input.dataset(starts).map(select)
    options = tf.data.Options()
    # Batches of a function of the step are made by hand for each replica (law 5), never by splitting.
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    return batches.with_options(options)
