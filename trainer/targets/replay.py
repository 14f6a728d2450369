"""Store and data set to batches: what the student is shown, by step.

Step `t` trains on views `[t * B, (t + 1) * B)`. The input is a function of the step, so resuming is starting
elsewhere. A replay draws nothing; past the last stored view `trainer.targets.online` continues.
"""

from __future__ import annotations

import tensorflow as tf

from pipeline.inputs.dataset import Dataset
from pipeline.store.reader import Store
from pipeline.views.input import Batch, ViewInput
from pipeline.views.records import RecordSource
from pipeline.views.render import training_renderer
from pipeline.views.source import ImageSource
from trainer.distribution.strategy import replica_starts


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


def step_batches(
    view_input: ViewInput,
    start: int,
    stop: int,
    *,
    with_stored: bool,
    with_record: bool = False,
    replicas: int = 1,
    context: tf.distribute.InputContext | None = None,
) -> tf.data.Dataset:
    """The batches of steps `start .. stop - 1`, as the Distiller takes them.

    Args:
      view_input: of a replica's batch size b, K = b + 2 crops a batch.
      start: first step.
      stop: one past the last step.
      with_stored: whether to say which views are stored: only where a teacher fills in the others.
      with_record: whether to say what the views' records need besides the logits: where they are written back.
      replicas: R; a step is R batches, of R * b views in all.
      context: which of several input pipelines this is, under a strategy.

    Returns:
      Dicts of `views` int64 [b], `crops` uint8 [K, S, S, 3], `partner` int32 [b], `ratio` float32 [b], `logits`
      float32 [b, C] and, `with_stored`, `stored` bool [b], and, `with_record`, a dict `record` of columns of
      `ViewRecords` over [b], both hashes as found; a batch for each step and each replica that this pipeline feeds.
    """
    size = view_input.batch_size

    def select(batch: Batch) -> Batch:
        out = {
            "views": batch["views"][:size],
            "crops": batch["crops"],
            "partner": batch["partner"],
            "ratio": batch["ratio"][:size],
            "logits": batch["logits"],
        }
        if with_stored:
            out["stored"] = batch["stored"][:size]
        if with_record:
            columns = {name: name for name in ("example", "box", "flip")}
            columns |= {"crop_hash": "found_crop_hash", "source_hash": "found_source_hash"}
            out["record"] = {name: batch[column][:size] for name, column in columns.items()}
        return out

    starts = replica_starts(
        start,
        stop,
        batch_size=size * replicas,
        replicas=replicas,
        pipeline=context.input_pipeline_id if context else 0,
        pipelines=context.num_input_pipelines if context else 1,
    )
    return view_input.dataset(starts).map(select)
