"""Evaluates a student on a held-out split, without loading the teacher.

The store's `eval/` has the teacher's logits for the evaluation crops, with both fingerprints, which are checked as for any
view.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from pipeline.inputs.dataset import Dataset
from pipeline.inputs.device_memory import naming_memory
from pipeline.inputs.labels import UNLABELED, match_classes, top1
from pipeline.storage.files import atomic_file
from pipeline.store.replay import add_other_sizes
from pipeline.store.view_store import ViewStore
from pipeline.views.eval_crop import EvalCrop
from pipeline.views.input import ViewInput
from pipeline.views.records import EvalViews, eval_planner
from pipeline.views.render import eval_renderer
from pipeline.views.source import ImageSource
from trainer.config.run_files import Evaluation, TeacherFigures
from trainer.step.loss import DistillationLoss

# A Keras model, or another function that is called as one: views float32 [B, S, S, 3] in 0..255, `training`, to logits.
Network = Callable[..., tf.Tensor]
# Takes the logits of student and teacher of a batch, float32 [b, C] each; None without a teacher.
OnBatch = Callable[[np.ndarray, np.ndarray | None], None]


def accuracy_text(value: float | None) -> str:
    """An accuracy in percent; `n/a` for None."""
    return "n/a" if value is None else f"{value:.2%}"


def calibration_text(figures: Mapping[str, Any]) -> str:
    """The calibration error, to append to the line of an evaluation; empty if it was not computed."""
    error = figures.get("calibration_error")
    return "" if error is None else f", calibration error {error:.4f}"


def unlabeled_text(figures: Mapping[str, Any]) -> str:
    """Note on unlabeled images, to append to the line of an evaluation; empty if all images are labeled."""
    if not (count := figures.get("unlabeled")):
        return ""
    return f" ({count:,} of {figures['examples']:,} images have no label; the accuracy excludes them)"


def evaluation_text(split: str, figures: Mapping[str, Any]) -> str:
    """The figures of a student on a split, one line, and one more for each of several teachers."""
    teacher = "mean of the teachers" if "teachers" in figures else "teacher"
    lines = [
        f"  teacher of {part['store']} at {part['image_size']} pixels: {accuracy_text(part['top1'])}, agreement "
        f"{part['agreement']:.2%}"
        for part in figures.get("teachers", [])
    ]
    first = (
        f"{split}: student {accuracy_text(figures['student_top1'])}, {teacher} {accuracy_text(figures['teacher_top1'])}, "
        f"agreement {figures['agreement']:.2%}, distillation loss {figures['distillation_loss']:.4f}"
    )
    return "\n".join([f"{first}{calibration_text(figures)}{unlabeled_text(figures)}", *lines])


def split_logits(
    student: Network,
    dataset: Dataset,
    *,
    eval_crop: EvalCrop,
    image_size: int,
    batch_size: int,
    remedy: str,
    buffer_bytes: int | None = None,
) -> Iterator[np.ndarray]:
    """Yields the logits of a model per batch of the evaluation crops of a split, float32 [b, C], in the order of the split.

    Args:
      remedy: what to change if a batch needs too much memory, such as "lower --batch_size".
    """
    left = dataset.num_examples
    size = min(batch_size, left)
    # The number of classes is that of logits that are not there.
    records = EvalViews(eval_crop=eval_crop, image_size=image_size, num_examples=left, num_classes=1)
    source = ImageSource(dataset, eval_renderer(eval_crop, image_size))
    plan = eval_planner(size, num_examples=left)
    view_input = ViewInput(records, source, size, plan, buffer_bytes=buffer_bytes)
    forward = _traced(student)
    for batch in view_input.batches(np.arange(0, left, size)):
        with naming_memory(f"{remedy} ({size} images per evaluation batch)"):
            logits = forward(batch["crops"][:size]).numpy()
        yield logits[:left]
        left -= size


def _traced(student: Network) -> Callable[[tf.Tensor], tf.Tensor]:
    """A model as a graph function from crops uint8 [B, S, S, 3] to logits float32 [B, C]."""

    @tf.function
    def forward(crops: tf.Tensor) -> tf.Tensor:
        return tf.cast(student(tf.cast(crops, tf.float32), training=False), tf.float32)

    return forward


class Evaluator:
    """Evaluation crops, labels and teacher logits of one split.

    Args:
      cache_bytes: memory for crops and teacher logits, which are kept if those of all images fit.

    Attributes:
      predictions: those of the student that was evaluated last, int64 [n] in the order of the split: classes of the teacher, or of
        the data set where the store has a class map. None before the first evaluation.
    """

    predictions: np.ndarray | None = None

    def __init__(
        self,
        store: ViewStore,
        dataset: Dataset,
        *,
        batch_size: int,
        temperature: float,
        temperature_squared: bool,
        cache_bytes: int,
        buffer_bytes: int | None = None,
    ) -> None:
        self.split = dataset.split
        self._size = min(batch_size, dataset.num_examples)
        self._count = dataset.num_examples
        self._loss = DistillationLoss(temperature, temperature_squared=temperature_squared)
        crop, split = store.spec.eval_crop, dataset.split
        source = ImageSource(dataset, eval_renderer(crop, store.image_size))
        plan = eval_planner(self._size, num_examples=self._count)
        records = store.eval_reader(split)
        self._input = add_other_sizes(
            ViewInput(records, source, self._size, plan, buffer_bytes=buffer_bytes),
            store,
            records=lambda part: part.eval_reader(split),
            renderer=lambda part: eval_renderer(crop, part.image_size),
        )
        kept_bytes = (
            store.image_size**2 * 3 + 4 * store.spec.num_classes
        )  # per image: crop and teacher logits
        self._keep = self._count * kept_bytes <= cache_bytes
        self._kept: list[tuple[tf.Tensor, tf.Tensor]] = []
        self._traced: tuple[Network, Callable[[tf.Tensor], tf.Tensor]] | None = None
        self._match = match_classes(dataset, store.spec.num_classes, store.classes)
        self._labels = self._match.labels(dataset, np.arange(self._count))
        self._stores = store.stores

    def _batches(self) -> list[tuple[tf.Tensor, tf.Tensor]]:
        """Batches of (crops uint8 [B, S, S, 3], teacher logits float32 [B, C]), as a list or an iterator."""
        if self._kept:
            return self._kept
        starts = np.arange(0, self._count, self._size)
        rendered = ((b["crops"][: self._size], b["logits"]) for b in self._input.batches(starts))
        if not self._keep:
            return rendered  # type: ignore[return-value]
        self._kept = list(rendered)
        return self._kept

    def _forward(self, student: Network) -> Callable[[tf.Tensor], tf.Tensor]:
        """The student as a graph function, traced once per student."""
        if self._traced is None or self._traced[0] is not student:
            self._traced = (student, _traced(student))
        return self._traced[1]

    def logits(self, student: Network) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields the logits of student and teacher per batch, float32 [b, C] each, in the order of the split.

        All logits of a split may not fit into memory: 21,841 classes for 1.3 million images take 105 GiB.
        """
        forward, left = self._forward(student), self._count
        remedy = f"lower --eval_batch_size ({self._size} images per batch)"
        for crops, logits in self._batches():
            with naming_memory(remedy):
                ours = forward(crops).numpy()
            yield ours[:left], logits.numpy()[:left]
            left -= self._size

    def write_predictions(self, path: Path) -> None:
        """Writes `predictions` as `top1` and `labels`, int32 [n] each, in the order of the split, to an .npz file."""
        if self.predictions is None:
            raise ValueError("nothing was evaluated")
        with atomic_file(path) as temporary, temporary.open("wb") as file:
            np.savez(file, top1=self.predictions.astype(np.int32), labels=self._labels.astype(np.int32))

    def evaluate(self, student: Network, *, on_batch: OnBatch | None = None) -> Evaluation:
        """Evaluates a student.

        Args:
          on_batch: called for each batch.

        Raises:
          DataError: an evaluation crop differs from the one that the teacher saw.
        """
        # Five numbers per image: int64 [n], int64 [n], int64 [n], bool [n], float32 [n].
        choices, teacher_choices, own, same, losses = [], [], [], [], []
        for ours, theirs in self.logits(student):
            if on_batch is not None:
                on_batch(ours, theirs)
            choices.append(self._match.predict(ours))
            teacher_choices.append(self._match.predict(theirs))
            own.append(ours.argmax(axis=1))
            same.append(own[-1] == theirs.argmax(axis=1))
            losses.append(self._loss.call(tf.constant(theirs), tf.constant(ours)).numpy())
        choice, teacher_choice = np.concatenate(choices), np.concatenate(teacher_choices)
        self.predictions = choice
        computed = self._match.no_accuracy is None
        found = Evaluation(
            examples=self._count,
            unlabeled=int((self._labels == UNLABELED).sum()) if computed else 0,
            student_top1=top1(choice, self._labels),
            teacher_top1=top1(teacher_choice, self._labels),
            agreement=float(np.concatenate(same).mean()),
            distillation_loss=float(tf.reduce_mean(np.concatenate(losses))),
        )
        if len(self._stores) > 1:
            found["teachers"] = [
                TeacherFigures(
                    store=store.location,
                    image_size=store.image_size,
                    top1=top1(predicted, self._labels),
                    agreement=float((np.concatenate(own) == theirs).mean()),
                )
                for store, (theirs, predicted) in zip(self._stores, self._each_choice, strict=True)
            ]
        return found

    @functools.cached_property
    def _each_choice(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Class of the largest logit of each store's teacher, and its prediction as a label, int64 [n] each."""
        batches = np.array_split(np.arange(self._count), -(-self._count // self._size))
        out = []
        for store in self._stores:
            reader, choices, predictions = store.eval_reader(self.split), [], []
            for rows in batches:
                logits = reader.read(rows).logits
                choices.append(logits.argmax(axis=1))
                predictions.append(self._match.predict(logits))
            out.append((np.concatenate(choices), np.concatenate(predictions)))
        return out
