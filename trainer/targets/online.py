"""Past the last stored view: the same sequence of views goes on, drawn now, with a live teacher's logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import numpy as np
import tensorflow as tf

from pipeline.errors import DataError, UserError
from pipeline.errors.causes import first_line
from pipeline.inputs.device_memory import out_of_memory
from pipeline.inputs.teacher import check_shape
from pipeline.inputs.teacher_checks import check_logits, check_rows, tolerance_of, trial_crops
from pipeline.store.codecs import Codec
from pipeline.store.reader import SplitReader, Store
from pipeline.store.spec import Spec
from pipeline.views.input import Batch
from pipeline.views.mix import mix
from pipeline.views.records import SampledViews, ViewRecords
from pipeline.views.source import ImageSource, LoadedImages
from trainer.step.distiller import shown_to_teacher


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


@dataclasses.dataclass(frozen=True)
class BatchedTeacher:
    """The teacher in batches of the size that the store's spec names, the last one filled up.

    A view's logits depend on the size of the batch that it is run in, in the last bits, but not on its
    neighbours: so they are the precompute's, bit for bit on a machine of the same kind, whatever batches the
    student takes. A student batch that is no multiple of the size costs the teacher the rows of padding.

    Attributes:
      teacher: float32 [size, S, S, 3] in 0..255 to logits [size, C]; its batch dimension may be fixed.
      batch_size: the size, 1 or more.
    """

    teacher: Callable[[tf.Tensor], tf.Tensor]
    batch_size: int

    def padding(self, count: int) -> int:
        """Rows of padding for `count` views."""
        return -count % self.batch_size

    def __call__(self, views: tf.Tensor) -> tf.Tensor:
        """float32 [B, S, S, 3] in 0..255 to float32 [B, C], B static; may be called inside a graph."""
        count = views.shape[0]
        # Real views, not zeros: a teacher that normalizes over an image divides by its deviation.
        filled = tf.concat([views, tf.repeat(views[-1:], self.padding(count), axis=0)], axis=0)
        if filled.shape[0] == self.batch_size:
            return tf.cast(self.teacher(filled), tf.float32)[:count]
        # [k * size, S, S, 3] to [k, size, S, S, 3]; a loop, so that the teacher is in the graph once.
        batches = tf.reshape(filled, [-1, self.batch_size, *views.shape[1:]])
        logits = tf.map_fn(
            lambda batch: tf.cast(self.teacher(batch), tf.float32),
            batches,
            fn_output_signature=tf.float32,
            parallel_iterations=1,
        )
        return tf.reshape(logits, [filled.shape[0], -1])[:count]


def try_teacher(teacher: BatchedTeacher, spec: Spec, *, path: str, jit_compile: bool) -> None:
    """Tries the teacher as the online steps will run it: the first of them may be days away.

    Args:
      teacher: of the run.
      spec: of the store.
      path: of the teacher, for the message.
      jit_compile: whether the steps are compiled with XLA, which knows fewer operations than TensorFlow.

    Raises:
      UserError: it cannot be run, gives something else than [size, C] logits, or they depend on more than a row.
    """
    size = spec.policy.image_size
    crops = trial_crops(teacher.batch_size, size)
    forward = tf.function(
        teacher,
        input_signature=[tf.TensorSpec([teacher.batch_size, size, size, 3], tf.float32)],
        jit_compile=jit_compile,
    )

    def run(rows: np.ndarray) -> np.ndarray:
        outputs: np.ndarray = forward(tf.cast(rows, tf.float32)).numpy()
        return outputs

    compiled = ", compiled with XLA (leave out --jit_compile)" if jit_compile else ""
    try:
        logits = run(crops)
        tolerance = tolerance_of(forward.get_concrete_function().graph)
    except (ValueError, TypeError, tf.errors.OpError) as error:
        remedy = (
            f"--teacher={path} runs on {teacher.batch_size} views at a time, the store's --teacher_batch_size: train on "
            "stored views alone, or on a device with more memory"
        )
        raise out_of_memory(error, remedy) or UserError(
            f"--teacher={path}: cannot run on {teacher.batch_size} views of {size} x {size}{compiled}: {first_line(error)}"
        ) from error
    check_shape(logits, (teacher.batch_size, spec.num_classes), path=path)
    check_rows(run, crops, tolerance=tolerance, path=path)
    check_logits(logits, path=path, assume_logits=bool(spec.provenance.get("assume_logits")))


def find_unfit_logits(batches: Iterable[Batch], teacher: BatchedTeacher, codec: Codec) -> DataError | None:
    """Looks for an online logit that the store's codec cannot hold, as the precompute would have refused it.

    The step itself does not look: a check inside would not compile for a TPU. Such a logit makes the loss
    infinite or not a number, and then is the time to look.

    Args:
      batches: to look at, as the Distiller takes them.
      teacher: the run's.
      codec: the store's.

    Returns:
      An error that names the first view, or None where all logits fit.
    """
    for batch in batches:
        views = mix(batch["crops"], batch["partner"], batch["ratio"])
        logits = teacher(shown_to_teacher(batch, views)).numpy()
        try:
            codec.encode(logits, first_view=int(batch["views"][0]))
        except DataError as error:
            return error
    return None
