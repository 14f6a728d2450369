"""Store and data set to batches with targets, by step.

Step `t` trains on views `[t * B, (t + 1) * B)`. The input is a pure function of the step, so resuming a run means
starting at another step.
"""

from __future__ import annotations

import dataclasses
import math

import tensorflow as tf

from pipeline.inputs.dataset import Dataset
from pipeline.store.replay import add_other_sizes
from pipeline.store.view_store import ViewStore
from pipeline.views.input import Batch, ViewInput
from pipeline.views.source import ImageSource
from trainer.config.run_length import replica_batch_size
from trainer.distribution.strategy import replica_starts
from trainer.targets.arms import OFFLINE, Arm
from trainer.targets.continued_views import ContinuedViews

# Columns of `ViewRecords` besides ratio and logits, and where the input pipeline has them. Both hashes are those of
# the rendered view, because a view that was drawn just now has no stored ones.
_RECORD_COLUMNS = {
    "example": "example",
    "box": "box",
    "flip": "flip",
    "crop_hash": "found_crop_hash",
    "source_hash": "found_source_hash",
}


def _continued(store: ViewStore, first_sampled: int) -> ContinuedViews:
    """The views of a store, drawn from view `first_sampled` on."""
    spec = store.spec
    return ContinuedViews(
        policy=spec.policy,
        seed=spec.seed,
        num_examples=spec.num_examples,
        num_classes=spec.num_classes,
        stored=store.views,
        first_sampled=first_sampled,
    )


class Targets:
    """The training input of a run: for each step, the views and the teacher's logits, or a mark where a live teacher
    computes them.

    Three modes, chosen by the arm and by `continued_from`:

    - offline: every logit comes from the store.
    - online from the first step: the arm is live, or `continued_from` is 0.
    - offline, then online past the stored views: `continued_from` is the number of stored views.

    Args:
      replicas: R, a divisor of B. A step is R batches of b = B / R views.
      buffer_bytes: Memory for batches that are rendered ahead; a quarter of the machine's memory by default.
      continued_from: First view that is drawn instead of read, with logits of a live teacher; None for no such view.
      with_record: Whether online batches carry the columns that a store's record needs besides the logits.

    Attributes:
      input: The input pipeline of one replica, of b views per batch, at the student's image size.
      online_from: First step with a view whose logits a live teacher computes; `math.inf` if there is none.

    Raises:
      UserError: `batch_size` is not a multiple of `replicas`.
    """

    def __init__(
        self,
        store: ViewStore,
        dataset: Dataset,
        arm: Arm = OFFLINE,
        *,
        batch_size: int,
        replicas: int = 1,
        image_cache_bytes: int = 0,
        buffer_bytes: int | None = None,
        continued_from: int | None = None,
        with_record: bool = False,
    ) -> None:
        size = replica_batch_size(batch_size, replicas)
        source = ImageSource(dataset, store.policy().renderer(), cache_bytes=image_cache_bytes)
        records = arm.records(store) if continued_from is None else _continued(store, continued_from)
        crops = arm.crops(store, batch_size=size)
        self.input = add_other_sizes(
            ViewInput(records, source, size, buffer_bytes=buffer_bytes, **crops),
            store,
            records=lambda part: part.views if continued_from is None else _continued(part, continued_from),
            renderer=lambda part: part.policy().renderer(),
        )
        self.online_from: int | float = 0 if arm.live else math.inf
        if continued_from is not None:
            self.online_from = min(self.online_from, continued_from // batch_size)
        self._arm = arm
        self._teacher_sizes = [part.image_size for part in store.stores]
        self._replicas = replicas
        self._with_record = with_record

    def batches(
        self, start: int, stop: int, *, context: tf.distribute.InputContext | None = None
    ) -> tf.data.Dataset:
        """The batches of steps `start .. stop - 1`, as the Distiller takes them.

        Args:
          context: Which of several input pipelines this is, under a strategy.

        Returns:
          A data set of dicts, one for each step and each replica that this pipeline feeds: `views` int64 [b], `crops`
          uint8 [K, S, S, 3], `partner` int32 [b], `ratio` float32 [b], `logits` float32 [b, C]. If a step is online,
          also `stored` bool [b] (False where a live teacher computes the logits); `teacher_crops`, if the teacher sees
          other crops than the student (see `Distiller`); and, `with_record`, a dict `record` of columns over [b].
        """
        online = stop > self.online_from
        starts = replica_starts(
            start,
            stop,
            batch_size=self.input.batch_size * self._replicas,
            replicas=self._replicas,
            pipeline=context.input_pipeline_id if context else 0,
            pipelines=context.num_input_pipelines if context else 1,
        )
        return self.input.dataset(starts, with_others=online).map(
            tf.autograph.experimental.do_not_convert(lambda batch: self._select(batch, online=online))
        )

    def teacher_input(self, batch_size: int) -> ViewInput:
        """The input pipeline of the views as the precompute of the store rendered them, for a single store."""
        own = self.input.others[0] if self.input.others else self.input
        return dataclasses.replace(own, batch_size=batch_size)

    def _teacher_crops(self, batch: Batch) -> Batch:
        """Crops at the teachers' image sizes, as `teacher_crops`, unless all are the student's."""
        crops = {other["crops"].shape[1]: other["crops"] for other in batch.get("others", ())}
        if not crops:
            return {}
        if len(self._teacher_sizes) == 1:
            return {"teacher_crops": crops[self._teacher_sizes[0]]}
        crops[self.input.renderer.image_size] = batch["crops"]
        return {"teacher_crops": {str(size): crops[size] for size in self._teacher_sizes}}

    def _select(self, batch: Batch, *, online: bool) -> Batch:
        """A batch of the input pipeline to one of the Distiller."""
        size = self.input.batch_size
        out = {
            "views": batch["views"][:size],
            "crops": batch["crops"],
            "partner": batch["partner"],
            "ratio": batch["ratio"][:size],
            "logits": batch["logits"],
        }
        if online:
            stored = batch["stored"][:size]
            out["stored"] = tf.zeros_like(stored) if self._arm.live else stored
            out |= self._teacher_crops(batch)
        if online and self._with_record:
            # The crop's fingerprint in a store is that of its own size.
            own = batch["others"][0] if self.input.others else batch
            out["record"] = {name: own[column][:size] for name, column in _RECORD_COLUMNS.items()}
        return self._arm.adapt(out)
