"""The live teachers of online steps, each run as the precompute of its store runs it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import tensorflow as tf

from pipeline.errors import DataError, UserError
from pipeline.errors.causes import first_line
from pipeline.inputs.device_memory import out_of_memory
from pipeline.inputs.teacher import Teacher, check_shape
from pipeline.inputs.teacher_checks import check_logits, check_rows, tolerance_of, trial_crops
from pipeline.store.codecs import Codec
from pipeline.store.combination import average_in_graph
from pipeline.store.spec import Spec
from pipeline.views.input import Batch
from pipeline.views.mix import mix
from trainer.step.distiller import shown_to_teacher


@dataclasses.dataclass(frozen=True)
class BatchedTeacher:
    """A teacher that runs on batches of one size, the last one padded.

    The last bits of a view's logits depend on the size of its batch, but not on the other views in it. So with the
    batch size of the store's spec the logits are those of the precompute, bit for bit on the same kind of machine,
    for any batch size of the student. If that is not a multiple, the teacher also computes the rows of padding.

    Attributes:
      teacher: float32 [size, S, S, 3] in 0..255 to logits [size, C]; its batch dimension may be fixed.
      batch_size: Views per teacher batch, 1 or more.
    """

    teacher: Callable[[tf.Tensor], tf.Tensor]
    batch_size: int

    def padding(self, count: int) -> int:
        """Number of padding rows for `count` views."""
        return -count % self.batch_size

    def __call__(self, views: tf.Tensor) -> tf.Tensor:
        """float32 [B, S, S, 3] in 0..255 to float32 [B, C], B static; may be called inside a graph."""
        count = views.shape[0]
        # Padded with a real view, not with zeros: a teacher that normalizes images divides by their deviation.
        padded = tf.concat([views, tf.repeat(views[-1:], self.padding(count), axis=0)], axis=0)
        if padded.shape[0] == self.batch_size:
            return tf.cast(self.teacher(padded), tf.float32)[:count]
        # [k * size, S, S, 3] to [k, size, S, S, 3], in a loop so that the graph contains the teacher only once.
        batches = tf.reshape(padded, [-1, self.batch_size, *views.shape[1:]])
        logits = tf.map_fn(
            lambda batch: tf.cast(self.teacher(batch), tf.float32),
            batches,
            fn_output_signature=tf.float32,
            parallel_iterations=1,
        )
        return tf.reshape(logits, [padded.shape[0], -1])[:count]


def try_teacher(teacher: BatchedTeacher, spec: Spec, *, path: str, jit_compile: bool) -> None:
    """Runs the teacher once as the online steps will, because the first of them may be days away.

    Args:
      jit_compile: Whether the steps are compiled with XLA, which supports fewer operations than TensorFlow.

    Raises:
      UserError: the teacher fails, returns anything but [size, C] logits, or a row's logits depend on other rows.
    """
    what, size = f"`teacher`={path}", spec.policy.image_size
    crops = trial_crops(teacher.batch_size, size)
    forward = tf.function(
        teacher,
        input_signature=[tf.TensorSpec([teacher.batch_size, size, size, 3], tf.float32)],
        jit_compile=jit_compile,
    )

    def run(rows: np.ndarray) -> np.ndarray:
        outputs: np.ndarray = forward(tf.cast(rows, tf.float32)).numpy()
        return outputs

    compiled = " compiled with XLA (leave out --jit_compile)" if jit_compile else ""
    try:
        logits = run(crops)
        tolerance = tolerance_of(forward.get_concrete_function().graph)
    except (ValueError, TypeError, tf.errors.OpError) as error:
        remedy = (
            f"{what} runs on {teacher.batch_size} views at a time, the store's --teacher_batch_size; train on "
            "stored views only, or on a device with more memory"
        )
        raise out_of_memory(error, remedy) or UserError(
            f"{what}: cannot run on {teacher.batch_size} views of {size} x {size}{compiled}: {first_line(error)}"
        ) from error
    check_shape(logits, (teacher.batch_size, spec.num_classes), what=what)
    check_rows(run, crops, tolerance=tolerance, what=what)
    check_logits(logits, what=what, assume_logits=bool(spec.provenance.get("assume_logits")))


@dataclasses.dataclass(frozen=True)
class OnlineTeacher:
    """The live teacher of one store.

    Attributes:
      teacher: The loaded teacher.
      path: Its path, for messages.
      spec: Spec of the store.
    """

    teacher: Teacher
    path: str
    spec: Spec

    @property
    def batched(self) -> BatchedTeacher:
        """The teacher in batches of the precompute's size."""
        return BatchedTeacher(self.teacher, self.spec.teacher.batch_size)

    @functools.cached_property
    def codec(self) -> Codec:
        """Codec of the store."""
        return self.spec.make_codec()


@dataclasses.dataclass(frozen=True)
class OnlineTeachers:
    """The live teachers of a run, one per store. A callable, and its `round_trip`, as the Distiller takes them.

    Attributes:
      members: The teachers, in the order of the stores.
      weights: Weight of each in the mean of their logits.
    """

    members: tuple[OnlineTeacher, ...]
    weights: tuple[float, ...] = (1.0,)

    @property
    def num_parameters(self) -> int | None:
        """Number of parameters of all teachers; None if those of one are unknown."""
        counts = [member.teacher.num_parameters for member in self.members]
        return None if None in counts else sum(filter(None, counts))

    def __call__(self, views: Any) -> Any:
        """Logits float32 [B, C] of a single teacher; a tuple of such of several.

        Args:
          views: Views as `shown_to_teacher` returns them.
        """
        if len(self.members) == 1:
            return self.members[0].batched(views)
        return tuple(member.batched(_of_size(views, member)) for member in self.members)

    def round_trip(self, logits: Any) -> tf.Tensor:
        """Output of `__call__` as the stores would return it: encoded, decoded, averaged; float32 [B, C]."""
        if len(self.members) == 1:
            return self.members[0].codec.round_trip(logits)
        decoded = [member.codec.round_trip(part) for member, part in zip(self.members, logits, strict=True)]
        return average_in_graph(decoded, self.weights)

    def check(self, *, jit_compile: bool) -> None:
        """Runs each teacher once; see `try_teacher`."""
        for member in self.members:
            try_teacher(member.batched, member.spec, path=member.path, jit_compile=jit_compile)

    def find_unfit_logits(self, batches: Iterable[Batch]) -> DataError | None:
        """Finds an online logit that the codec of its store cannot represent, which the precompute would have refused.

        The step itself does not check, because a check inside it would not compile for a TPU. Such a logit makes the loss
        infinite or NaN, and this function then finds the cause.

        Args:
          batches: Batches of `Targets` to search.

        Returns:
          An error that names the first such view, or None if all logits fit.
        """
        for batch in batches:
            views = shown_to_teacher(batch, mix(batch["crops"], batch["partner"], batch["ratio"]))
            for member in self.members:
                logits = member.batched(_of_size(views, member)).numpy()
                try:
                    member.codec.encode(logits, first_view=int(batch["views"][0]))
                except DataError as error:
                    return error
        return None


def _of_size(views: Any, member: OnlineTeacher) -> tf.Tensor:
    """The views at the image size of a teacher."""
    return views[str(member.spec.policy.image_size)] if isinstance(views, dict) else views
